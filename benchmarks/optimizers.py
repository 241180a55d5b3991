"""Every optimizer of optax on stacked parameters, compared with the same optimizer on the unrolled parameters.

    python -m benchmarks.optimizers [NAME ...]

There is no model: gradients are drawn at random, except for line searches, which get the gradients of a function of the
parameters. The tree has a stack of matrices, vectors, three-dimensional kernels and scalars, a stack in a stack, and
parameters outside stacks. Each optimizer makes five steps through `train.blockwise` on the stacks, on one device and on
``fsdp=4,tensor=2``, and five steps without it on the unrolled tree, in float64 and float32. The difference is that of
the updates, relative to the largest update of the leaf. The results are in benchmarks/results/optimizers.json.
"""

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import parallel
from sapwood.core.param import Param, Stacked
from sapwood.train import blockwise

RESULTS = Path(__file__).parent / "results" / "optimizers.json"
BOUNDS = {"float64": 1e-9, "float32": 1e-5}
STEPS, BLOCKS, MESH = 5, 3, "fsdp=4,tensor=2"
WHERE = ("one device", MESH)

EXCEPTIONS = {
    "differentially_private_aggregate": "takes the gradients of each example, which have one more dimension",
    "dpsgd": "takes the gradients of each example, which have one more dimension",
    "lookahead": "takes pairs of fast and slow parameters, which no model has",
}
"""Optimizers that are not compared, and why."""

ROUNDED = {
    "lbfgs, no line search": "divides by products of differences: of the unrolled tree, float32 is 8e-4 from float64",
    "schedule_free": "subtracts what is nearly equal: of the unrolled tree, float32 is 2e-4 from float64",
}
"""Optimizers with a bound of 1e-4 in float32, and why. In float64 they have the bound of all others."""

LAYOUT = {  # path: (stack's depths and sizes, one block's shape, how the whole leaf lies on fsdp=4,tensor=2)
    "embed/table": ((), (12, 8), (None, "fsdp")),
    "blocks/up/kernel": (((1, BLOCKS),), (8, 12), (None, "fsdp", "tensor")),
    "blocks/up/bias": (((1, BLOCKS),), (12,), (None, "tensor")),
    "blocks/heads/kernel": (((1, BLOCKS),), (8, 2, 5), (None, "fsdp", "tensor")),
    "blocks/gain": (((1, BLOCKS),), (), ()),
    "groups/inner/kernel": (((1, 2), (2, 2)), (4, 6), (None, None, "fsdp", "tensor")),
    "head/bias": ((), (6,), ()),
}


def _inner() -> Any:
    return optax.adam(1e-2)


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def _labels(params: Any) -> Any:
    return jax.tree.map(lambda x: "slow" if jnp.ndim(x) > 1 else "fast", params)


def _third(params: Any) -> Any:
    """A mask by path that is False for the last of the blocks, so one block of a stack is treated differently."""
    last = str(BLOCKS - 1)
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[1], "key", "") != last, params)


def _often(step: Any, *_: Any, **__: Any) -> Any:
    return step % 2 == 0


GROUPS = {"slow": optax.lamb(1e-2), "fast": optax.adam(1e-2)}
GIVEN: dict[str, Any] = {
    "learning_rate": 1e-2, "clipping": 0.1, "eta": 0.01, "gamma": 0.5, "max_delta": 0.1, "threshold": 0.1,
    "max_norm": 0.1, "decay": 0.9, "step_size": 0.1, "max_backtracking_steps": 5, "max_linesearch_steps": 5,
    "step_size_fn": lambda count: 0.1 / (1 + count), "inner": optax.lamb(1e-2), "base_optimizer": optax.adam(1e-2),
    "max_consecutive_errors": 3, "should_transform_fn": _often, "mask": _matrices, "freeze_mask": _matrices,
    "optimizer": optax.sgd(1e-2), "adv_optimizer": optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
    "transforms": GROUPS, "param_labels": _labels, "tx": optax.lamb(1e-2),
    "measure": lambda updates, *_, **__: optax.global_norm(updates), "measure_name": "norm",
}  # fmt: skip
"""Values of the required arguments of optimizers, by the argument's name."""

SPECIAL: dict[str, Callable[[], Any]] = {
    "add_noise": lambda: optax.add_noise(0.01, 0.5, 0),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.lamb(1e-2)),
    "named_chain": lambda: optax.named_chain(("clip", optax.clip_by_global_norm(0.1)), ("rate", optax.lars(1e-2))),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.lamb)(learning_rate=1e-2),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.lamb)(learning_rate=1e-2),
    "stateless": lambda: optax.stateless(lambda g, _: jax.tree.map(lambda x: x / jnp.linalg.norm(x), g)),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda g, _: g / jnp.linalg.norm(g)),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4, momentum=0.9),
    "galore": lambda: optax.contrib.galore(1e-2, rank=2, update_proj_gap=2),
    "scale_by_galore": lambda: optax.contrib.scale_by_galore(rank=2, update_proj_gap=2),
    "scale_by_muon": lambda: optax.masked(
        optax.contrib.scale_by_muon(weight_dimension_numbers=_plain), lambda p: jax.tree.map(_is_matrix, p)
    ),
    "sm3": lambda: optax.masked(optax.sm3(1e-2), _arrays),
    "scale_by_distance_over_gradients": lambda: optax.masked(optax.scale_by_distance_over_gradients(), _arrays),
    "scale_by_sm3": lambda: optax.masked(optax.scale_by_sm3(), _arrays),
    "measure_with_ema": lambda: _scaled_by(optax.measure_with_ema(optax.global_norm, 0.9)),
    "noisy_sgd": lambda: optax.noisy_sgd(1e-2, key=0),
    "scale_by_trust_ratio": lambda: optax.scale_by_trust_ratio(),
}
MORE: dict[str, Callable[[], Any]] = {
    "MultiSteps": lambda: optax.MultiSteps(optax.lamb(1e-2), 2),
    "adamw, decay of matrices": lambda: optax.adamw(1e-2, weight_decay=1.0, mask=_matrices),
    "adamw, decay by path": lambda: optax.adamw(1e-2, weight_decay=1.0, mask=_third),
    "lamb, blocks apart": lambda: optax.masked(optax.lamb(1e-2), _third),
    "scale_by_factored_rms": lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=4),
    "clip_by_global_norm, prodigy": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.contrib.prodigy()),
    "clip_by_global_norm, adamw": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
    "muon, heads": lambda: optax.contrib.muon(1e-2, muon_weight_dimension_numbers=_dimensions),
    "muon, aol": lambda: optax.contrib.muon(1e-2, preconditioning="aol", ns_coeffs="dion"),
    "lbfgs, no line search": lambda: optax.lbfgs(1e-2, linesearch=None),
    "agc": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(1.0)),
}


def _scaled_by(measure: Any) -> Any:
    """An optimizer that multiplies gradients by the number that ``measure`` gives for them."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple:
        number, state = measure.update(grads, state, params)
        return jax.tree.map(lambda g: g * number, grads), state

    return optax.GradientTransformation(measure.init, update)


def _is_matrix(x: Any) -> bool:
    return jnp.ndim(x) == 2


def _arrays(params: Any) -> Any:
    """A mask that leaves out scalars, for which some optimizers have no rule."""
    return jax.tree.map(lambda x: jnp.ndim(x) > 0, params)


def _plain(params: Any) -> Any:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)


def _dimensions(params: Any) -> Any:
    heads = optax.contrib.MuonDimensionNumbers(0, (1, 2))
    return jax.tree.map(
        lambda x: heads if x.ndim == 3 else optax.contrib.MuonDimensionNumbers() if x.ndim == 2 else None, params
    )


def optimizers() -> dict[str, Callable[[], Any]]:
    """All optimizers of optax and optax.contrib except `EXCEPTIONS`, and those of `MORE` with options, by name."""
    found: dict[str, Callable[[], Any]] = {}
    for module in (optax, optax.contrib):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            returned = str(inspect.signature(function).return_annotation)
            if "GradientTransformation" in returned and not name.startswith("_"):
                found[name] = SPECIAL.get(name) or functools.partial(_made, function)
    return {name: make for name, make in sorted((found | MORE).items()) if name not in EXCEPTIONS}


def _made(function: Callable[..., Any]) -> Any:
    parameters = inspect.signature(function).parameters.values()
    return function(
        **{x.name: GIVEN[x.name] for x in parameters if x.default is x.empty and x.kind is not x.VAR_KEYWORD}
    )


# ---- trees, made without the code that is tried ----------------------------------------------------------------------


def declared() -> dict:
    """The stacked tree, with a `Param` at each leaf."""
    tree: dict = {}
    for path, (stack, block, _) in LAYOUT.items():
        levels = tuple(Stacked(depth, size, "layers") for depth, size in stack)
        _put(tree, path.split("/"), Param((*(size for _, size in stack), *block), "float32", None, None, levels))
    return tree


def _put(tree: dict, path: list[str], x: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = x


def stacked(draw: np.random.Generator, dtype: str) -> dict:
    """A random stacked tree. The blocks of a stack have different scales."""
    tree: dict = {}
    for path, (stack, block, _) in LAYOUT.items():
        sizes = tuple(size for _, size in stack)
        scale = draw.uniform(0.1, 3.0, sizes + (1,) * len(block))
        _put(tree, path.split("/"), np.asarray(scale * draw.normal(size=sizes + block), dtype))
    return tree


def unrolled(tree: dict) -> dict:
    """The unrolled tree of a stacked tree: each block has a path of its own."""
    out: dict = {}
    for path, (stack, _, _) in LAYOUT.items():
        x = functools.reduce(lambda node, name: node[name], path.split("/"), tree)
        for index in np.ndindex(*(size for _, size in stack)):
            names, added = path.split("/"), 0
            for (depth, _), i in zip(stack, index, strict=True):
                names.insert(depth + added, str(i))
            _put(out, names, x[index])
    return out


def _shardings(mesh: Any) -> dict:
    tree: dict = {}
    for path, (_, _, spec) in LAYOUT.items():
        _put(tree, path.split("/"), NamedSharding(mesh, PartitionSpec(*spec)))
    return tree


# ---- the comparison --------------------------------------------------------------------------------------------------

SEARCHES = ("linesearch", "lbfgs", "polyak")
"""Parts of the names of optimizers that need the gradients of a function."""
TAKES = {"sam": (), "sophia": ("obj_fn",)}
"""Optimizers whose extra arguments of `update` differ from those that a trainer passes."""


def updates(
    optimizer: Any, trees: tuple, search: bool, takes: Sequence[str], places: Any = None, state_places: Any = None
) -> Any:
    """The updates of all steps of an optimizer. Each leaf has a leading dimension for the steps.

    Args:
        optimizer: the optimizer.
        trees: the parameters, the minimum and the curvature of a quadratic function, and the gradients of all steps.
        search: True to use the gradients of that function instead of the given ones.
        takes: the extra arguments of `update`: "value", "grad", "value_fn", "obj_fn".
        places: the shardings of the parameters; None on one device.
        state_places: the shardings of the optimizer state; None on one device.
    """
    params, goal, curve, gradients = trees
    optimizer = optax.with_extra_args_support(optimizer)

    def value(params: Any) -> Any:
        parts = jax.tree.map(lambda p, g, c: (abs(c) * (p - g) ** 2).sum() / 2, params, goal, curve)
        return sum(jax.tree.leaves(parts))

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        loss, true = jax.value_and_grad(value)(params)
        grads = true if search else grads
        known = {"value": loss, "grad": grads, "value_fn": value, "obj_fn": value}
        extra = {name: known[name] for name in takes}
        found, state = optimizer.update(grads, state, params, **extra)
        return _placed((optax.apply_updates(params, found), state)), found

    def _placed(carry: Any) -> Any:
        carry = jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.result_type(x)), carry)  # of no weak type
        return carry if places is None else jax.lax.with_sharding_constraint(carry, (places, state_places))

    return jax.lax.scan(step, _placed((params, optimizer.init(params))), gradients)[1]


def differences(name: str, make: Callable[[], Any], dtype: str, where: Sequence[str] = WHERE) -> dict[str, float]:
    """The largest relative difference of the updates, on one device and on a mesh; infinite if one is not finite."""
    how = {"search": any(word in name for word in SEARCHES), "takes": TAKES.get(name, ("value", "grad", "value_fn"))}
    with jax.enable_x64(dtype == "float64"):
        draw = np.random.default_rng(0)
        drawn = [stacked(draw, dtype) for _ in range(3 + STEPS)]

        def trees(change: Callable[[dict], dict]) -> tuple:
            params, goal, curve, *gradients = map(change, drawn)
            return params, goal, curve, jax.tree.map(lambda *leaves: np.stack(leaves), *gradients)

        ours, plain = trees(lambda tree: tree), trees(unrolled)
        seen = blockwise(make(), declared())

        def alone(ours: tuple) -> Any:
            return updates(seen, ours, **how)

        def spread(ours: tuple) -> Any:
            mesh = sw.mesh(MESH)
            places = _shardings(mesh)
            states = parallel.opt_shardings(seen, declared(), places, mesh)
            return updates(seen, ours, **how, places=places, state_places=states)

        expected = jax.device_get(jax.jit(lambda plain: updates(make(), plain, **how))(plain))
        found = {}
        for name, run in zip(WHERE, (alone, spread), strict=True):
            if name in where:
                got = jax.device_get(jax.jit(run)(ours))
                found[name] = max(_difference(unrolled(_of(got, k)), _of(expected, k)) for k in range(STEPS))
        return found


def _of(tree: dict, step: int) -> dict:
    return jax.tree.map(lambda x: x[step], tree)


def _difference(a: dict, b: dict) -> float:
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.float64(x), np.float64(y)
        worst = max(worst, float(abs(x - y).max() / max(abs(y).max(), 1e-30)) if np.isfinite(y).all() else np.inf)
    return worst if np.isfinite(worst) else np.inf


def table(names: Iterable[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """The `differences` of each optimizer, by name and dtype."""
    every = optimizers()
    found: dict = {}
    for name in every if names is None else names:
        found[name] = {}
        for dtype in BOUNDS:
            try:
                found[name][dtype] = differences(name, every[name], dtype)
            except Exception as error:
                raise RuntimeError(f"{name} in {dtype}") from error
        print(name, found[name], flush=True)
    return found


def failed(found: dict) -> list[str]:
    """The names of the optimizers with a difference beyond their bound."""

    def bound(name: str, dtype: str) -> float:
        return 1e-4 if name in ROUNDED and dtype == "float32" else BOUNDS[dtype]

    return [
        name
        for name, by in found.items()
        if not all(x <= bound(name, dtype) for dtype, at in by.items() for x in at.values())
    ]


if __name__ == "__main__":
    made = table(sys.argv[1:] or None)
    if not sys.argv[1:]:
        versions = {"jax": jax.__version__, "optax": optax.__version__}
        text = {
            "versions": versions,
            "bounds": BOUNDS,
            "exceptions": EXCEPTIONS,
            "rounded": ROUNDED,
            "differences": made,
        }
        RESULTS.write_text(json.dumps(text, indent=1) + "\n")
    print(
        f"{len(made)} optimizers, beyond the bound: {', '.join(failed(made)) or 'none'}; {len(EXCEPTIONS)} not compared"
    )

"""The matrix: every layout of eight devices, each with every kind of model, against one device.

A cell is three steps of training. Its three numbers are the worst relative errors of the losses of all steps, of the
variables after the last, and of the gradients of the first; an array's error is the largest difference over its largest
entry. All is deterministic, so what differs is the order of float32 sums. A second test moves a trained state through
the checkpoints of the layouts.

CI runs a diagonal: each layout with one model, each model somewhere (`pytest -k matrix -s` prints it), three of these
cells in a plain run. The rest is `long`: `pytest -m "long or not long" -k matrix -s` runs and prints all.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.layers.experts import routing
from sapwood.metrics import compute
from sapwood.models import Decoder
from sapwood.parallel import ShardingWarning
from sapwood.parallel.pipeline.settings import Pipeline
from sapwood.parallel.place_activations import Placement
from sapwood.parallel.rule_tables import resolve
from sapwood.saving.checkpoints import Checkpoints
from sapwood.saving.digest import digests, named_leaves
from sapwood.train import next_token, supervised
from sapwood.train.state import plan

STEPS = 3
COMPILES = "a training step is compiled for eight devices, and that of one device to hold it against"


class Row(NamedTuple):
    """A rule table on a mesh, and what must be seen of it, so that no cell passes because nothing was split.

    `parameters` are the mesh axes that parameters are split over, all of them and no others; `moments` those of the
    optimizer's, where they are not the same; `activations` some of those that activations are split over. `sends` is
    in the compiled step. `model` is the one whose cell is not long, `plain` whether it is not slow either.
    """

    name: str
    model: str
    rules: str
    mesh: str
    parameters: str = ""
    moments: str | None = None
    activations: str = ""
    sends: str = "all-reduce"
    plain: bool = False
    pipeline: Pipeline = Pipeline()

    def marks(self, model: str) -> tuple:
        if model != self.model:
            return (pytest.mark.long,)
        return (pytest.mark.costs(COMPILES),) if self.plain else (pytest.mark.slow,)


RING, EXCHANGE = "collective-permute", "all-to-all"
STAGES = "stage=4,data=2"
ROWS = (
    Row("data", "conv", "data", "data=8", activations="data"),
    Row("fsdp", "transformer", "fsdp", "fsdp=8", "fsdp", activations="fsdp", sends="all-gather"),
    Row("zero1", "mlp", "zero1", "data=8", "", "data", "data", "all-gather", plain=True),
    Row("tensor", "mlp", "tensor", "data=2,tensor=4", "tensor", activations="data tensor", plain=True),
    Row("fsdp+tensor", "conv", "fsdp+tensor", "fsdp=4,tensor=2", "fsdp tensor", activations="fsdp tensor"),
    Row("sequence", "transformer", "sequence", "data=2,sequence=4", activations="sequence", sends=RING),
    Row("ulysses", "transformer", "ulysses", "data=2,sequence=4", activations="sequence", sends=EXCHANGE),
    Row("expert", "mixture", "expert", "data=2,expert=4", "expert", activations="expert", sends=EXCHANGE),
    Row("pipeline", "mlp", "pipeline", "stage=8", "stage", activations="stage", sends=RING, plain=True),
    Row("replica", "conv", "replica", "replica=2,data=4", activations="replica data"),
    Row("replica+fsdp+tensor", "conv", "replica+fsdp+tensor", "replica=2,fsdp=2,tensor=2", "fsdp tensor"),
    Row("replica+zero1", "conv", "replica+zero1", "replica=2,data=4", "", "replica data", "replica data", "all-gather"),
    Row("zero1+tensor", "mlp", "zero1+tensor", "data=4,tensor=2", "tensor", "data tensor", "data tensor", "all-gather"),
    Row(
        "fsdp+sequence+tensor",
        "mixture",
        "fsdp+sequence+tensor",
        "fsdp=2,sequence=2,tensor=2",
        "fsdp tensor",
        sends=RING,
    ),
    Row("expert+tensor", "mixture", "expert+tensor", "expert=4,tensor=2", "expert tensor", sends=EXCHANGE),
    Row("pipeline+data", "mlp", "pipeline+data", STAGES, "stage", activations="data", sends=RING),
    Row("interleaved", "mlp", "pipeline+data", STAGES, "stage", sends=RING, pipeline=Pipeline(None, "interleaved")),
    Row("1f1b", "transformer", "pipeline+data", STAGES, "stage", sends=RING, pipeline=Pipeline(None, "1f1b")),
    Row(
        "pipeline+fsdp+tensor",
        "mlp",
        "pipeline+fsdp+tensor",
        "stage=2,fsdp=2,tensor=2",
        "stage fsdp tensor",
        sends=RING,
    ),
    Row("default", "conv", "default", "data=2,fsdp=2,tensor=2", "fsdp tensor", activations="data fsdp tensor"),
)


# ---- the models -----------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """An objective and its batches, what it has beside a batch, and how far float32 may be off, with the reason.

    `seed` is what its batches are drawn from.
    """

    objective: Callable
    batch: Callable[[np.random.Generator], dict[str, np.ndarray]]
    has: tuple[str, ...]
    losses: float
    variables: float
    gradients: float
    seed: int = 0


def mlp(v, x):
    """Blocks with names in a stack, and a last layer without."""

    def block(v, x):
        h = v.shard(jnp.tanh(L.Dense(32, axes=("embed", "mlp"))(v.up, x)), "batch", "mlp")
        return x + L.Dense(16, axes=("mlp", "embed"))(v.down, h)

    return L.Dense(8)(v.logits, L.Scan(block, 8)(v.blocks, x))


def conv_net(v, image):
    names = ("channels_in", "channels_out")
    x = L.Conv(16, (3, 3), bias=False, axes=names)(v.stem, image)
    x = v.shard(jax.nn.relu(L.BatchNorm()(v.norm1, x)), "batch", "height", "width", "channels_out")
    x = L.Conv(32, (3, 3), strides=2, bias=False, axes=names)(v.conv, x)
    x = v.shard(jax.nn.relu(L.BatchNorm()(v.norm2, x)), "batch", "height", "width", "channels_out")
    return L.Dense(8)(v.logits, x.mean((1, 2)))


def rows(*shape: int, classes: int = 8):
    return lambda draw: {
        "x": draw.normal(size=shape).astype("f"),
        "label": draw.integers(classes, size=shape[0], dtype="i4"),
    }


def text(length: int):
    def batch(draw: np.random.Generator) -> dict[str, np.ndarray]:
        tokens = draw.integers(32, size=(8, length + 1), dtype="i4")
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}

    return batch


DECODER = Decoder(vocabulary=32, depth=8, width=16, heads=4, mlp=32)
MIXTURE = dataclasses.replace(DECODER, mlp=16, experts=8)
MODELS = {
    # Sums of 16 examples and 32 units in another order.
    "mlp": Model(supervised(mlp, inputs="x"), rows(16, 16), ("blocks",), 1e-5, 1e-4, 1e-5),
    # Batch statistics are sums over the shards of all images, and their gradient is a difference of like numbers.
    "conv": Model(supervised(conv_net, inputs="x"), rows(16, 8, 8, 8), (), 1e-5, 1e-4, 1e-4),
    # Sums over heads, hidden units, the vocabulary and 128 tokens, through eight blocks.
    "transformer": Model(next_token(DECODER), text(16), ("length", "blocks"), 1e-5, 1e-4, 1e-4),
    # The same, and tokens come back from their experts in another order. Where two experts are all but equal for a
    # token, rounding chooses, so this takes fewer tokens, drawn such that nowhere they are.
    "mixture": Model(next_token(MIXTURE), text(8), ("length", "blocks", "experts"), 1e-5, 1e-4, 1e-4, seed=7),
}


def batches(model: str) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(MODELS[model].seed)
    return [MODELS[model].batch(draw) for _ in range(STEPS)]


def remember() -> optax.GradientTransformation:
    """An optimizer that changes nothing and keeps the gradient it was given last."""
    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, *_: (g, g))


# Adam's update is g / (|g| + eps) at first. With the usual eps of 1e-8 a gradient of 1e-7, all rounding, would move its
# parameter as far as any other.
OPTIMIZER = optax.chain(remember(), optax.adam(1e-2, eps=1e-3))

# ---- a run ----------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What is compared, by path: NumPy arrays; and what was seen of the layout."""

    losses: dict[str, np.ndarray]
    variables: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    state: Any
    axes: dict[str, set[str]]
    program: str


def trainer(model: str, row: Row | None = None) -> sw.Trainer:
    if row is None:
        return sw.Trainer(MODELS[model].objective, OPTIMIZER)
    mesh = sw.mesh(row.mesh)
    rules = dataclasses.replace(resolve(mesh, row.rules)[1], min_size=1, pipeline=row.pipeline)  # small, but split
    return sw.Trainer(MODELS[model].objective, OPTIMIZER, mesh=mesh, rules=rules)


def by_path(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in named_leaves(tree).items()}


def split_axes(tree: Any) -> set[str]:
    """The mesh axes that some array of a tree is split over: of which a device really holds a part."""
    found = set()
    for x in jax.tree.leaves(tree):
        if isinstance(x.sharding, jax.sharding.NamedSharding) and x.sharding.shard_shape(x.shape) != x.shape:
            assert x.addressable_shards[0].data.shape == x.sharding.shard_shape(x.shape)
            found |= named_in(x.sharding)
    return found


def named_in(sharding: Any) -> set[str]:
    return {name for entry in sharding.spec if entry for name in ((entry,) if isinstance(entry, str) else entry)}


@pytest.fixture
def activations(monkeypatch) -> set[str]:
    """The mesh axes that the activations of what is traced from here on are split over."""
    found, place = set(), Placement.__call__

    def noting(self, axes, shape, *where):
        sharding = place(self, axes, shape, *where)
        if sharding is not None:
            found.update(named_in(sharding))
        return sharding

    monkeypatch.setattr(Placement, "__call__", noting)
    return found


@functools.cache
def start(model: str) -> Any:
    """The state before the first step, as NumPy arrays; the random key, which nothing here draws from, left out."""
    return jax.device_get(trainer(model).init(0, batches(model)[0]).replace(rng=None))


def run(model: str, row: Row | None = None) -> Run:
    train, first = trainer(model, row), batches(model)[0]
    shardings = plan.plan(train, first).shardings
    state = jax.device_put(start(model).replace(rng=jax.random.key(0)), shardings)
    step = train.compiled.train(shardings).lower(state, train.put(first)).compile()
    losses, gradients = [], {}
    for batch in batches(model):
        state, found = jax.block_until_ready(step(state, train.put(batch)))
        gradients = gradients or by_path(state.opt_state[0])
        found = compute(found)
        assert found["checks"]
        losses.append([found[name] for name in ("loss", "auxiliary_loss") if name in found])
    axes = {"parameters": split_axes(state.params), "moments": split_axes(state.opt_state)}
    variables = by_path({"params": state.params, "state": state.state})
    each = {f"step {i}": np.array(loss) for i, loss in enumerate(losses)}
    return Run(each, variables, gradients, state, axes, step.as_text())


@functools.cache
def alone(model: str) -> Run:
    """The run on one device."""
    found = run(model)
    dead = [path for path, g in found.gradients.items() if np.abs(g).max() < 1e-5]
    assert not dead, f"these have no gradient to compare: {dead}"
    return found


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest entry; infinite for what is not finite."""
    worst = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    return float(worst) if np.isfinite(worst) else np.inf


# ---- the matrix -----------------------------------------------------------------------------------------------------

FOUND: dict[tuple[str, str], str] = {}
NEEDS = {"sequence": "length", "expert": "experts", "stage": "blocks"}
WHY = {
    "length": 'no "length" to split over "sequence"',
    "experts": 'no experts: "expert" splits the batch alone, as "data" does',
    "blocks": 'no stack of equal blocks to cut into the stages of "stage"',
    "balance": "the balance loss is not a mean over examples, and each micro-batch has its own",
}


def empty(row: Row, model: str) -> str | None:
    """What keeps a cell empty, one of `WHY`; None where nothing does."""
    has = MODELS[model].has
    missing = [needed for axis, needed in NEEDS.items() if f"{axis}=" in row.mesh and needed not in has]
    return missing[0] if missing else "balance" if "stage" in row.mesh and "experts" in has else None


def cells() -> list:
    pairs = [(row, model) for row in ROWS for model in MODELS if empty(row, model) is None]
    return [pytest.param(row, model, id=f"{row.name}-{model}", marks=row.marks(model)) for row, model in pairs]


def empty_cells() -> list:
    """Those of the convolutions are traced at once; of the others one of each kind is not long."""
    pairs = [(row, model) for row in ROWS for model in MODELS if empty(row, model)]
    also = [("pipeline", "mixture"), ("expert", "transformer"), ("sequence", "mlp")]
    short = [model == "conv" or (row.name, model) in also for row, model in pairs]
    return [
        pytest.param(row, model, id=f"{row.name}-{model}", marks=() if quick else pytest.mark.long)
        for (row, model), quick in zip(pairs, short, strict=True)
    ]


@pytest.fixture(scope="module", autouse=True)
def matrix():
    """Prints the matrix when all cells are done, whatever came of them."""
    yield

    def cell(row: Row, model: str) -> str:
        why = empty(row, model)
        return f"({[*WHY].index(why) + 1})" if why else FOUND.get((row.name, model), "not run")

    print(f"\n\nThe worst relative errors of losses, variables and gradients after {STEPS} steps on 8 devices\n")
    table = [("rules", "mesh", *MODELS), *((r.name, r.mesh, *(cell(r, model) for model in MODELS)) for r in ROWS)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    for i, why in enumerate(WHY.values(), 1):
        print(f"({i}) {why}")
    for name, model in MODELS.items():
        print(f"tolerances of {name}: {model.losses:g} {model.variables:g} {model.gradients:g}")


@pytest.mark.parametrize(("row", "model"), cells())
def test_the_matrix(row, model, activations):
    FOUND[row.name, model] = "FAILED"
    one = alone(model)
    activations.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShardingWarning)  # sizes are such that all that the rules split divides
        found = run(model, row)
    wrong, worst = [], []
    for part in ("losses", "variables", "gradients"):
        mine, theirs, limit = getattr(found, part), getattr(one, part), getattr(MODELS[model], part)
        assert mine.keys() == theirs.keys()
        errors = {path: error(mine[path], theirs[path]) for path in theirs}
        worst.append(max(errors.values()))
        wrong += [f"{part} {path}: {value:.1e} > {limit:g}" for path, value in errors.items() if not value <= limit]
    numbers = " ".join(f"{value:.0e}" for value in worst)
    FOUND[row.name, model] = f"FAILED {numbers}" if wrong else numbers
    assert not wrong, wrong
    FOUND[row.name, model] = f"VACUOUS {numbers}"
    assert found.axes["parameters"] == set(row.parameters.split())
    assert found.axes["moments"] == set((row.parameters if row.moments is None else row.moments).split())
    assert activations >= set(row.activations.split())
    assert re.search(rf"\b{row.sends}(-start)?\(", found.program)
    FOUND[row.name, model] = numbers


@pytest.mark.slow
def test_no_token_of_the_matrix_is_between_two_experts(monkeypatch):
    """All steps on one device: a token's last expert is ahead of the next by far more than float32 may be off."""
    gaps, route = [], routing.top_k_routing

    def noting(logits, k, *args):
        ranked = jnp.sort(logits, -1)
        gap = jnp.min(ranked[..., -k] - ranked[..., -k - 1]) / jnp.max(jnp.abs(logits))
        jax.debug.callback(lambda gap: gaps.append(float(gap)), gap)
        return route(logits, k, *args)

    monkeypatch.setattr(routing, "top_k_routing", noting)
    run("mixture")
    jax.effects_barrier()
    assert len(gaps) == STEPS * MIXTURE.depth
    assert min(gaps) > 5e-5


@pytest.mark.parametrize(("row", "model"), empty_cells())
def test_an_empty_cell_of_the_matrix_is_one(row, model, activations):
    across, batch = trainer(model, row), batches(model)[0]
    shapes = plan.plan(across, batch).shapes
    why = empty(row, model)
    if why == "balance":  # the program says so
        with pytest.raises(
            sw.ConfigError, match=r"the loss 'balance' of a mixture of experts is no mean over examples"
        ):
            jax.eval_shape(across.step, shapes, batch)
    else:
        jax.eval_shape(across.step, shapes, batch)
    held = set().union(*(named_in(x.sharding) for x in jax.tree.leaves(shapes.params)))
    if why == "balance":
        assert "stage" in held
    elif why == "length":
        assert "sequence" not in activations | held
    else:
        assert {"experts": "expert", "blocks": "stage"}[why] not in held


def legal(model: str) -> list[Row]:
    return [row for row in ROWS if empty(row, model) is None]


def diagonal(model: str, plain: bool) -> list[Row]:
    return [row for row in ROWS if row.model == model and row.plain == plain]


@pytest.mark.parametrize(
    ("model", "through"),
    [
        pytest.param("mlp", diagonal("mlp", plain=True), marks=pytest.mark.costs(COMPILES), id="mlp"),
        *(
            pytest.param(name, diagonal(name, plain=False), marks=pytest.mark.slow, id=f"{name}-more")
            for name in MODELS
        ),
        *(pytest.param(name, legal(name), marks=pytest.mark.long, id=f"{name}-all") for name in MODELS),
    ],
)
def test_checkpoints_move_through_the_matrix(model, through, tmp_path):
    """From one device through layouts in turn and back: each reads what the one before wrote, and writes.

    As each finds and leaves the same digests, it would find them in what any other wrote.
    """
    state = alone(model).state
    expected = digests(named_leaves(state))
    expected_params = by_path(state.params)
    for number, row in enumerate((*through, None)):
        with Checkpoints(tmp_path / str(number)) as checkpoints:
            checkpoints.save(STEPS, state)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ShardingWarning)
            shapes = plan.plan(trainer(model, row), batches(model)[0]).shapes
        state, info = Checkpoints(tmp_path / str(number)).restore(shapes)
        assert info.digests == expected
        assert digests(named_leaves(state)) == expected
        jax.tree.map(np.testing.assert_array_equal, by_path(state.params), expected_params)
        if row is not None:
            assert jax.tree.all(jax.tree.map(lambda x, shape: x.sharding == shape.sharding, state, shapes))
            assert split_axes(state.params) == set(row.parameters.split())

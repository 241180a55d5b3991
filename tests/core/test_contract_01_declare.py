"""Contract 1: `sw.spec` is the union of both modes, and every contradiction is an error that names both sides."""

import jax
import jax.export
import jax.numpy as jnp
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core import paths
from sapwood.core.initializers import normal, ones, zeros

X = jax.ShapeDtypeStruct((8, 4), jnp.float32)


def shapes(tree):
    return {paths.join(path): param.shape for path, param in paths.leaves(tree)}


def test_the_union_of_train_and_eval():
    def model(v, x):
        if v.train:
            return L.Dense(2)(v.aux, x)
        v.state("seen", (3,), zeros, dtype="int32")
        return L.Dense(5)(v.head, x)

    spec = sw.spec(model, X)
    assert sorted(spec.params) == ["aux", "head"]
    assert spec.state["seen"] == sw.Param((3,), jnp.dtype("int32"), zeros, None)


def test_what_is_recorded():
    spec = sw.spec(lambda v, x: v.up.param("kernel", (4, 3), normal(0.1), axes=("embed", "mlp"), dtype="bfloat16"), X)
    assert spec.params["up"]["kernel"] == sw.Param((4, 3), jnp.dtype("bfloat16"), normal(0.1), ("embed", "mlp"))
    assert spec.state == {}


def test_numbers_sort_as_numbers():
    def model(v, x):
        for i in (10, 2, 1):
            x = L.Dense(4, bias=False)(v.blocks[i], x)
        return x

    assert list(sw.spec(model, X).params["blocks"]) == ["1", "2", "10"]


TRANSFORMS = {
    "jit": lambda f: lambda v, x: jax.jit(f)(v, x),
    "vmap": lambda f: lambda v, x: jax.vmap(f, in_axes=(None, 0))(v, x),
    "grad": lambda f: lambda v, x: jax.grad(lambda x: f(v, x).sum())(x),
    "checkpoint": lambda f: lambda v, x: jax.checkpoint(f)(v, x),
    "scan": lambda f: lambda v, x: jax.lax.scan(lambda c, row: (c, f(v, row)), 0, x)[1],
    "cond": lambda f: lambda v, x: jax.lax.cond(x.sum() > 0, f, lambda v, x: f(v, x) + 1, v, x),
    "while": lambda f: lambda v, x: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: f(v, x), x),
    "jit in scan in vmap": lambda f: (
        lambda v, x: jax.vmap(lambda r: jax.lax.scan(lambda c, _: (jax.jit(f)(v, c), None), r, None, 2)[0])(x)
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_declarations_go_to_the_root_through_any_transform(name):
    block = lambda v, x: L.Dense(4, bias=False)(v.inner, x)  # noqa: E731
    spec = sw.spec(lambda v, x: TRANSFORMS[name](block)(v.outer, x), X)
    assert shapes(spec.params) == {"outer/inner/kernel": (4, 4)}


def test_a_jitted_block_declares_at_every_place():
    block = jax.jit(sw.pure(lambda v, x: L.Dense(4, bias=False)(v.up, x)))
    for _ in range(2):  # a second spec does not meet the first one's traces
        spec = sw.spec(lambda v, x: [block(v.blocks[i], x) for i in range(3)], X)
        assert list(spec.params["blocks"]) == ["0", "1", "2"]


def test_stacked_variables_lead_with_their_copies():
    block = L.Vmap(L.Dense(4, axes=("embed", "mlp")), 2, in_axes=None)
    spec = sw.spec(lambda v, x: L.Scan(lambda v, x: block(v.experts, x).mean(0), 3)(v.blocks, x), X)
    kernel = spec.params["blocks"]["experts"]["kernel"]
    assert kernel.shape == (3, 2, 4, 4)
    assert kernel.axes == ("layers", "expert", "embed", "mlp")
    assert [(s.depth, s.size, s.axis) for s in kernel.stacked] == [(1, 3, "layers"), (2, 2, "expert")]


def twice(**second):
    first = {"shape": (4,), "init": ones, "axes": ("embed",), "dtype": "float32"}

    def model(v, x):
        for options in (first, {**first, **second}):
            v.norm.param("scale", options["shape"], options["init"], axes=options["axes"], dtype=options["dtype"])

    return model


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"shape": (5,)}, r"with a different shape: first \(4,\), now \(5,\)"),
        ({"dtype": "bfloat16"}, "with a different dtype: first float32, now bfloat16"),
        ({"axes": ("mlp",)}, r"with a different axes: first \('embed',\), now \('mlp',\)"),
        ({"init": zeros}, r"with a different init: first constant\(value=1\), now constant\(value=0\)"),
    ],
)
def test_a_second_declaration_must_agree(second, message):
    with pytest.raises(sw.DeclarationError, match=f"params norm/scale is declared twice {message}; variables that"):
        sw.spec(twice(**second), X)
    assert list(sw.spec(twice(), X).params) == ["norm"]


def test_modes_must_agree_too():
    with pytest.raises(sw.DeclarationError, match=r"different shape: first \(1,\), now \(2,\)"):
        sw.spec(lambda v, x: v.param("w", (1 if v.train else 2,), zeros), X)


def test_closures_of_one_code_are_one_initialiser():
    init = jax.nn.initializers.normal
    model = lambda v, x, b: (v.param("w", (3,), init(0.1)), v.param("w", (3,), init(b)))  # noqa: E731
    assert sw.spec(model, X, 0.1).params["w"].shape == (3,)
    with pytest.raises(sw.DeclarationError, match="declared twice with a different init"):
        sw.spec(model, X, 0.2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda v, x: (v.param("a", (), zeros), v.a.param("b", (), zeros)),
            "a is a variable in params and now a scope that holds a/b; give one of the two another name",
        ),
        (
            lambda v, x: (v.a.param("b", (), zeros), v.param("a", (), zeros)),
            r"a is a scope \(it holds a/b\) and is now declared as a variable in params",
        ),
        (
            lambda v, x: (v.a.state("b", (), zeros), v.param("a", (), zeros)),
            r"a is a scope \(it holds a/b\) and is now declared as a variable in params",
        ),
        (
            lambda v, x: (v.param("a", (), zeros), v.state("a", (), zeros)),
            "a is declared in params and now in state; one name is one variable",
        ),
    ],
)
def test_one_name_is_one_thing(model, message):
    with pytest.raises(sw.DeclarationError, match=message):
        sw.spec(model, X)


def test_a_symbolic_dimension_shapes_no_variable():
    struct = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 4"), jnp.float32)
    for declare in (lambda v, x: v.param("w", x.shape, zeros), lambda v, x: v.state("w", (x.shape[0] * 2,), zeros)):
        with pytest.raises(sw.DeclarationError, match=r"w: a variable's shape must be plain integers, got \('.*b'"):
            sw.spec(declare, struct)


@pytest.mark.parametrize("shape", [(-1,), (2.5,), ("3",), (None,)])
def test_shapes_that_are_none(shape):
    with pytest.raises(sw.DeclarationError, match=r"w: a variable's shape (must be plain integers|cannot be negative)"):
        sw.spec(lambda v, x: v.param("w", shape, zeros), X)


def test_axes_name_every_dimension():
    with pytest.raises(sw.DeclarationError, match=r"w: axes \('a',\) name 1 dimensions, the shape is \(2, 3\)"):
        sw.spec(lambda v, x: v.param("w", (2, 3), zeros, axes=("a",)), X)


def block(v, x):
    return L.Dense(4)(v.up, x)


@pytest.mark.parametrize("model", [lambda v, x: block(v.blocks, x), lambda v, x: L.Scan(block, 2)(v.blocks, x)])
def test_an_entry_that_nothing_declares(model):
    params = jax.tree.map(lambda p: jnp.zeros(p.shape), sw.spec(model, X).params)
    extra = {"blocks": {**params["blocks"], "upp": {"kernel": jnp.zeros((2, 4))}}}
    message = "declares no params blocks/upp/kernel"
    with pytest.raises(sw.DeclarationError, match=message):
        jax.eval_shape(lambda x: sw.apply(model, extra, {}, x), X)
    with pytest.raises(sw.DeclarationError, match="declares no state old/mean"):
        jax.eval_shape(lambda x: sw.apply(model, params, {"old": {"mean": jnp.zeros(3)}}, x), X)


def test_entries_of_the_other_mode_are_welcome():
    def model(v, x):
        return L.Dense(2)(v.aux, x) if v.train else L.Dense(2)(v.head, x)

    params = jax.tree.map(lambda p: jnp.zeros(p.shape), sw.spec(model, X).params)
    jax.eval_shape(lambda x: sw.apply(model, params, {}, x), X)


def test_spec_runs_nothing():
    ran = []
    sw.spec(lambda v, x: jax.debug.callback(ran.append, x.sum()), X)
    big = sw.spec(lambda v, x: v.param("w", (10**6, 10**6), zeros), X).params["w"]  # four terabytes
    assert not ran
    assert big.nbytes == 4 * 10**12


def test_a_cursor_does_not_outlive_its_spec():
    kept = []
    sw.spec(lambda v, x: kept.append(v), X)
    with pytest.raises(sw.EffectError, match=r"this cursor outlived the sw.spec that made it"):
        kept[0].param("w", (), zeros)

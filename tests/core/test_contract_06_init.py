"""Contract 6: a parameter's first value depends on its path alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.initializers import lecun_normal, normal, zeros
from sapwood.core.rng import fold, path_hash

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)
NORMAL = normal(1.0)


def block(v, x):
    return x + x @ v.up.param("kernel", (4, 4), NORMAL)


def unrolled(v, x):
    for i in range(3):
        x = block(v.blocks[i], x)
    return x


def test_the_value_is_that_of_its_path():
    params, _ = sw.init(unrolled, 7, X)
    for i in range(3):
        key = fold(jax.random.key(7), path_hash(("blocks", str(i), "up", "kernel")))
        np.testing.assert_array_equal(params["blocks"][str(i)]["up"]["kernel"], NORMAL(key, (4, 4), jnp.float32))


def test_call_order_and_company_do_not_matter():
    def other(v, x):
        v.blocks.more.param("bias", (4,), NORMAL)
        for i in (2, 0, 1):
            x = block(v.blocks[i], x)
        return x

    params, _ = sw.init(unrolled, 7, X)
    others, _ = sw.init(other, jax.random.key(7), X)
    del others["blocks"]["more"]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, others))


def test_scanning_does_not_matter():
    params, _ = sw.init(unrolled, 7, X)
    scanned, _ = sw.init(lambda v, x: L.Scan(block, 3)(v.blocks, x), 7, X)
    assert jax.tree.all(jax.tree.map(np.array_equal, sw.stack(params["blocks"]), scanned["blocks"]))


def test_nested_stacks():
    inner = lambda v, x: L.Vmap(block, 2, in_axes=None)(v.experts, x).mean(0)  # noqa: E731
    stacked, _ = sw.init(lambda v, x: L.Scan(inner, 3)(v.blocks, x), 7, X)
    by_hand = lambda v, x: [block(v.blocks[i].experts[j], x) for i in range(3) for j in range(2)]  # noqa: E731
    loose, _ = sw.init(by_hand, 7, X)
    for i in range(3):
        for j in range(2):
            one = stacked["blocks"]["experts"]["up"]["kernel"][i, j]
            np.testing.assert_array_equal(one, loose["blocks"][str(i)]["experts"][str(j)]["up"]["kernel"])


def test_inside_jit_and_as_shapes():
    params, _ = sw.init(unrolled, 7, X)
    jitted, _ = jax.jit(lambda key: sw.init(unrolled, key, X))(jax.random.key(7))
    assert jax.tree.all(jax.tree.map(np.allclose, params, jitted))
    shapes, _ = jax.eval_shape(lambda key: sw.init(unrolled, key, X), jax.random.key(7))
    assert shapes["blocks"]["0"]["up"]["kernel"].shape == (4, 4)


def test_dtypes_are_those_declared():
    model = lambda v, x: (v.param("a", (2,), NORMAL, dtype="bfloat16"), v.state("n", (2,), zeros, dtype="int32"))  # noqa: E731
    params, state = sw.init(model, 0, X)
    assert (params["a"].dtype, state["n"].dtype) == ("bfloat16", "int32")


def test_initialisers_that_are_none():
    with pytest.raises(sw.DeclarationError, match=r"the initialiser of params a/w must be a function init\(key"):
        sw.init(lambda v, x: v.a.param("w", (2,), 0.5), 0, X)
    with pytest.raises(sw.DeclarationError, match=r"of params a/w .* gave shape \(3,\), declared is \(2,\)"):
        sw.init(lambda v, x: v.a.param("w", (2,), lambda key, shape, dtype: jnp.ones(3)), 0, X)


def test_an_initialiser_that_raises_is_named():
    def broken(key, shape, dtype):
        raise ZeroDivisionError("as it happens")

    with pytest.raises(ZeroDivisionError, match="as it happens") as raised:
        sw.init(lambda v, x: v.a.param("w", (2,), broken), 0, X)
    assert any("in the initialiser of params a/w: <function" in note for note in raised.value.__notes__)
    message = (
        r"variance_scaling\(.*\) needs a shape with the dimensions in_axis and out_axis, got \(4,\); a vector starts"
    )
    with pytest.raises(sw.DeclarationError, match=message) as raised:
        sw.init(lambda v, x: v.a.param("w", (4,), lecun_normal()), 0, X)
    assert any("params a/w" in note and "float32[4]" in note for note in raised.value.__notes__)


def test_a_hundred_layers_compile_a_few_programs(caplog):
    def deep(v, x):
        for i in range(100):
            x = block(v.blocks[i], x) + v.blocks[i].param("bias", (4,), NORMAL)
        return x

    sw.init(unrolled, 0, X)  # what any init compiles
    with jax.log_compiles():
        sw.init(deep, 0, X)
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert 0 < len(compiled) <= 8, compiled

"""Contract 8: `put` keeps the declared shape and dtype; storage, compute and statistics have dtypes of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.initializers import ones, zeros


def put(value, shape=(2,), dtype=None, declare=True):
    def model(v):
        if declare:
            v.a.state("n", shape, zeros, dtype=dtype)
        v.a.put(n=value)

    state = {"a": {"n": jnp.zeros(shape, dtype)}}
    return sw.pure(model)(sw.bind({}, state))[1].state["a"]["n"]


def test_values_are_stored_as_declared():
    assert put(jnp.ones(2, "bfloat16")).dtype == "float32"
    assert put(jnp.ones(2), dtype="bfloat16").dtype == "bfloat16"
    assert put(np.ones(2, "int32")).dtype == "float32"
    assert put(np.array([True, False]), dtype="int32").dtype == "int32"
    assert put([1.0, 2.0]).shape == (2,)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (
            np.ones(3, "float32"),
            None,
            r"put\(n=...\) at 'a': declared float32\[2\], got float32\[3\]; a state",
        ),
        (1.0, None, r"declared float32\[2\], got float32\[\]"),
        (np.ones((1, 2), "float32"), None, r"got float32\[1, 2\]"),
        (np.ones(2, "float32"), "int32", r"declared int32\[2\], got float32\[2\]"),
    ],
)
def test_other_shapes_and_kinds_are_refused(value, dtype, message):
    with pytest.raises(sw.DeclarationError, match=message):
        put(value, dtype=dtype)


def test_declare_before_put():
    with pytest.raises(sw.DeclarationError, match=r"put\(n=...\) at 'a': declare it first with v.state\('n'"):
        put(np.ones(2), declare=False)


def test_the_next_state_has_the_same_avals():
    model = lambda v, x: L.BatchNorm()(v.norm, x)  # noqa: E731
    x = np.ones((4, 3), "float32")
    for policy in ("float32", "bfloat16", "float16"):
        spec = sw.spec(model, x, policy=policy)
        params, state = jax.tree.map(lambda p: jnp.ones(p.shape, p.dtype), tuple(spec))
        y, after = sw.apply(model, params, state, x, train=True, policy=policy)
        assert y.dtype == policy
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_storage_and_compute():
    policy = sw.Policy("bfloat16", param="float16")
    spec = sw.spec(lambda v: (v.param("a", (), ones), v.param("b", (), ones, dtype="float32")), policy=policy)
    assert (spec.params["a"].dtype, spec.params["b"].dtype) == ("float16", "float32")
    seen = lambda v: (v.param("a", (), ones), v.param("a", (), ones, cast=False), v.param("i", (), ones, dtype="int32"))  # noqa: E731
    values, _ = sw.apply(seen, {"a": np.float16(1), "i": np.int32(1)}, {}, policy=policy)
    assert [str(x.dtype) for x in values] == ["bfloat16", "float16", "int32"]


def test_cast_leaves_the_rest_alone():
    tree = {"x": np.ones(2, "float32"), "ids": np.ones(2, "int32"), "name": "a", "none": None}
    cast = sw.Policy("bfloat16").cast(tree)
    assert (cast["x"].dtype, cast["ids"].dtype, cast["name"], cast["none"]) == ("bfloat16", "int32", "a", None)
    assert sw.Policy().cast(tree) is tree


@pytest.mark.parametrize("dtype", ["bf16", "int32", 7, "float33"])
def test_dtypes_that_are_none(dtype):
    with pytest.raises(sw.ConfigError, match="a precision must be a floating dtype such as 'float32'"):
        sw.Policy(dtype)
    with pytest.raises(sw.ConfigError, match="a precision must be a floating dtype"):
        sw.Policy(param=dtype)


def test_a_variable_of_no_dtype():
    with pytest.raises(sw.ConfigError, match=r"a/w: 'float33' is no dtype; write 'float32', jnp.bfloat16 or the like"):
        sw.spec(lambda v: v.a.param("w", (), ones, dtype="float33"))

"""Contract 2: what is bound is read, in every mode; declare records only what is not bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.initializers import zeros

W, B = np.arange(6, dtype="float32").reshape(2, 3), np.ones(3, "float32")
X = np.ones((4, 2), "float32")


def test_a_raw_dict_is_a_cursor():
    assert np.array_equal(L.Dense(3)({"kernel": W, "bias": B}, X), X @ W + B)
    assert np.array_equal(L.Dense(3)({"kernel": jnp.asarray(W), "bias": B.tolist()}, X), X @ W + B)


def test_one_dict_serves_params_and_state():
    both = {"mean": B, "var": 4 * B, "scale": B, "bias": 0 * B}
    y = L.BatchNorm(eps=0.0)(both, np.full((2, 3), 5, "float32"))
    assert np.allclose(y, 2)


def test_bound_is_read_and_not_declared():
    def model(v, x):
        return L.Dense(3)({"kernel": L.Dense(6)(v.make, x[0]).reshape(2, 3), "bias": B}, x)

    spec = sw.spec(model, X)
    assert jax.tree.map(lambda p: p.shape, spec.params) == {"make": {"kernel": (2, 6), "bias": (6,)}}


def test_partly_replaced():
    def model(v, x):
        frozen = v.replace(params={"kernel": W})  # the kernel is given; the bias is still declared here
        return L.Dense(3)(frozen, x)

    assert list(sw.spec(model, X).params) == ["bias"]


def test_replaced_is_read_in_apply():
    model = lambda v, x: L.Dense(3)(v.a.replace(params={"kernel": W, "bias": B}), x)  # noqa: E731
    assert np.array_equal(sw.apply(model, {}, {}, X)[0], X @ W + B)


def test_apply_reads_what_is_bound_whatever_its_dtype():
    y, _ = sw.apply(lambda v: v.param("w", (2,), zeros), {"w": jnp.ones(2, "bfloat16")}, {})
    assert y.dtype == "bfloat16"
    y, _ = sw.apply(lambda v: v.param("w", (2,), zeros), {"w": jnp.ones(2, "bfloat16")}, {}, policy="float32")
    assert y.dtype == "float32"
    y, _ = sw.apply(lambda v: v.param("w", (2,), zeros, cast=False), {"w": B[:2]}, {}, policy="bfloat16")
    assert y.dtype == "float32"


def test_params_and_state_are_plain_dicts():
    v = sw.bind({"a": {"w": W}}, {"a": {"n": B}})
    assert sw.params(v.a) == {"w": W}
    assert sw.state(v) == {"a": {"n": B}}
    assert sw.params(v.missing) == {}


def test_a_bound_array_of_another_shape():
    with pytest.raises(sw.DeclarationError, match=r"params kernel: the model declares shape \(2, 4\), the bound array"):
        L.Dense(4)({"kernel": W, "bias": B}, X)


def test_what_is_missing_names_what_is_there():
    params = {"layer": {"kernal": W, "bias": B}}
    message = r"no 'layer/kernel' \(shape \(2, 3\), float32\); at 'layer' it holds bias, kernal; did you mean 'kernal'"
    with pytest.raises(sw.DeclarationError, match=message):
        sw.apply(lambda v, x: L.Dense(3)(v.layer, x), params, {}, X)
    message = r"no 'layr/kernel' .*; at '\(root\)' it holds layer; did you mean 'layer'"
    with pytest.raises(sw.DeclarationError, match=message):
        sw.apply(lambda v, x: L.Dense(3)(v.layr, x), params, {}, X)
    with pytest.raises(sw.DeclarationError, match=r"state has no 'n' \(shape \(\), float32\).*holds nothing"):
        sw.apply(lambda v: v.state("n", (), zeros), {}, {})


def test_descriptions_are_no_arrays():
    spec = sw.spec(lambda v, x: L.Dense(3)(v, x), X)
    with pytest.raises(sw.DeclarationError, match=r"params kernel holds Param, an array is expected; sw.spec only"):
        sw.apply(lambda v, x: L.Dense(3)(v, x), spec.params, {}, X)


@pytest.mark.parametrize(("params", "got"), [([1, 2], "list"), (None, "NoneType"), (W, "ndarray")])
def test_trees_are_dicts(params, got):
    with pytest.raises(TypeError, match=f"params must be a nested dict of arrays, got {got}"):
        sw.apply(lambda v: 0, params, {})


def test_a_cursor_is_no_tree():
    v = sw.bind({})
    with pytest.raises(TypeError, match=r"params must be .*, got a cursor; use sw.params\(v\)"):
        sw.bind(v)

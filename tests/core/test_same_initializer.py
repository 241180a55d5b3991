"""When two initialisers are one: made anew they are, made of something else they are not."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood.core.initializers import normal
from sapwood.core.same_initializer import initializer_key

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)


def fill(key, shape, dtype, a=0.0):
    return jnp.broadcast_to(jnp.asarray(a, dtype), shape)


def given(a):
    return lambda key, shape, dtype: fill(key, shape, dtype, a)


def defaults(a, f=fill):
    return lambda key, shape, dtype, a=a, f=f: f(key, shape, dtype, *([a] if f is fill else []))


def concrete(i):
    with jax.ensure_compile_time_eval():
        return given(jnp.full(2, float(i)))


def itself(i):
    def init(key, shape, dtype):
        return fill(key, shape, dtype, i if callable(init) else 0)

    return init


class Owner:
    def __init__(self, a):
        self.a = a

    def first(self, key, shape, dtype):
        return fill(key, shape, dtype, self.a)


class Holder(sw.Layer):
    a: Any

    def first(self, key, shape, dtype):
        return fill(key, shape, dtype, self.a)


@dataclass
class Fill:
    """It compares by value, and so has no hash."""

    a: Any

    def __call__(self, key, shape, dtype):
        return fill(key, shape, dtype, self.a)


@dataclass(slots=True)
class Narrow:
    """Neither a hash nor a `__dict__`."""

    a: float

    def __call__(self, key, shape, dtype):
        return fill(key, shape, dtype, self.a)


MAKERS = {
    "a number": given,
    "an array": lambda i: given(np.full(2, i)),
    "a JAX array": concrete,
    "a list": lambda i: given([i, i]),
    "a list of arrays": lambda i: given([np.full((), i), i]),
    "a default": lambda i: lambda key, shape, dtype, a=float(i): fill(key, shape, dtype, a),
    "a default array": lambda i: defaults(np.full(2, i)),
    "a keyword default": lambda i: lambda key, shape, dtype, *, a=float(i): fill(key, shape, dtype, a),
    "a function inside": lambda i: defaults(2, given(np.full(2, i))),
    "itself": itself,
    "a partial": lambda i: functools.partial(fill, a=np.full(2, i)),
    "a partial of a closure": lambda i: functools.partial(given(np.full(2, i))),
    "a method": lambda i: Owner(float(i)).first,
    "a method of an object with an array": lambda i: Owner(np.full(2, i)).first,
    "a layer's method": lambda i: Holder(float(i)).first,
    "a layer's method, with an array": lambda i: Holder(np.full(2, i)).first,
    "an object without a hash": lambda i: Fill(float(i)),
    "an object without a hash, with an array": lambda i: Fill(np.full(2, i)),
    "an object with slots": lambda i: Narrow(float(i)),
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@EVERY
def test_made_anew_it_is_the_same_and_of_something_else_another(make):
    assert initializer_key(make(1)) == initializer_key(make(1))
    assert hash(initializer_key(make(1))) == hash(initializer_key(make(1)))
    assert initializer_key(make(1)) != initializer_key(make(2))


@EVERY
def test_each_variable_starts_as_its_initialiser_says(make):
    def model(v, x):  # traced twice: each time the initialisers are others
        return [v[i].param("w", (2,), make(i)) for i in range(3)]

    params, _ = sw.init(model, 0, X)
    np.testing.assert_array_equal([params[str(i)]["w"] for i in range(3)], [[0, 0], [1, 1], [2, 2]])


@EVERY
def test_two_of_one_path_must_agree(make):
    model = lambda v, x: (v.param("w", (2,), make(1)), v.param("w", (2,), make(2)))  # noqa: E731
    with pytest.raises(sw.DeclarationError, match="params w is declared twice with a different init"):
        sw.spec(model, X)


@pytest.mark.parametrize("pair", [(1, 1.0), (1, True), (0.0, -0.0), (1.0, 1 + 0j), (np.int32(1), np.float32(1))])
def test_equal_numbers_of_two_types_are_two(pair):
    """An initialiser may do something else with each: 7 // 2 is not 7 / 2."""
    one, other = map(given, pair)
    assert initializer_key(one) != initializer_key(other)
    assert initializer_key((pair[0],)) != initializer_key((pair[1],))
    assert initializer_key({"a": [pair[0]]}) != initializer_key({"a": [pair[1]]})
    assert initializer_key(given(pair[0])) == initializer_key(one)
    assert initializer_key(given(float("nan"))) == initializer_key(given(float("nan")))


def made_with(**names):
    """An initialiser whose code is the same each time, and which reads `scale` from its module."""
    module = {"__name__": "somebodys_own", "np": np, **names}
    exec("def init(key, shape, dtype): return (lambda: np.full(shape, scale, dtype))()", module)
    return module["init"]


def test_globals_count():
    def model(v, x):
        return [v[i].param("w", (2,), made_with(scale=i)) for i in range(3)]

    params, _ = sw.init(model, 0, X)
    np.testing.assert_array_equal([params[str(i)]["w"] for i in range(3)], [[0, 0], [1, 1], [2, 2]])
    assert initializer_key(made_with(scale=1)) == initializer_key(made_with(scale=1, other=3))
    assert initializer_key(made_with(scale=1)) != initializer_key(made_with(scale=1.0))
    assert initializer_key(made_with(scale=np.ones(2))) == initializer_key(made_with(scale=np.ones(2)))
    assert initializer_key(made_with(scale=given(1))) != initializer_key(made_with(scale=given(2)))
    with pytest.raises(sw.DeclarationError, match="declared twice with a different init"):
        sw.spec(lambda v, x: [v.param("w", (2,), made_with(scale=i)) for i in range(2)], X)


def test_arrays_differ_in_shape_and_dtype_too():
    one = initializer_key(given(np.zeros(2, "float32")))
    assert one != initializer_key(given(np.zeros((1, 2), "float32")))
    assert one != initializer_key(given(np.zeros(2, "int32")))
    assert one != initializer_key(given(jnp.zeros(2)))


def test_random_keys_count_by_object():
    a, b = jax.random.split(jax.random.key(0))
    assert initializer_key(given(a)) == initializer_key(given(a)) != initializer_key(given(b))


def test_a_value_is_itself():
    assert initializer_key(normal(0.1)) == normal(0.1)
    assert initializer_key(None) is None

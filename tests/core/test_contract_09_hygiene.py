"""Contract 9: a cursor is a place and nothing else; layers and initialisers are values."""

import copy
import dataclasses
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core import initializers
from sapwood.core.initializers import zeros

RESERVED = [
    "check", "fold", "fork", "loss", "merge", "param", "policy", "put", "replace", "rng", "shard", "sow", "stack",
    "state", "train",
]  # fmt: skip


def cursor():
    return sw.bind({"a": {"w": np.ones(2)}, "state": {"w": np.ones(2)}, "10": {}, "9": {}})


def test_the_reserved_words_are_published_and_minimal():
    public = sorted(name for name in dir(sw.Vars) if not name.startswith("_"))
    assert public == RESERVED
    assert np.array_equal(cursor()["state"].param("w", (2,), zeros), [1, 1])  # any child is reached by brackets


def test_places():
    v = cursor()
    assert sw.params(v.a) is sw.params(v["a"])
    assert repr(v[3]) == repr(v["3"]) == repr(v[np.int64(3)]) == "Vars(3: empty)"
    assert repr(v) == "Vars((root): 9, 10, a, state)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("_a", "'_a' cannot name a variable or a scope: names are not empty, do not start with an underscore"),
        ("", "'' cannot name"),
        ("a/b", "'a/b' cannot name .* hold no slash"),
        (-1, "a child's name is a string or an integer from 0, not -1"),
        (1.0, "a string or an integer from 0, not 1.0"),
        (True, "a string or an integer from 0, not True"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(sw.DeclarationError, match=message):
        cursor().a[name]


def test_names_of_variables_too():
    v = cursor()
    for declare in (lambda n: v.param(n, (), zeros), lambda n: v.state(n, (), zeros), v.rng):
        for name in ("_w", "a/b", ""):
            with pytest.raises(sw.DeclarationError, match="cannot name a variable or a scope"):
                declare(name)


def test_a_traced_index():
    with pytest.raises(sw.DeclarationError, match=r"not .*Tracer.*; a traced index needs v.stack\(n\) and a scan"):
        jax.jit(lambda i: cursor()[i])(3)


def test_private_names_are_no_children():
    with pytest.raises(AttributeError, match="'_w': names in a tree of variables do not start with an underscore"):
        _ = cursor()._w
    assert not hasattr(cursor(), "_repr_html_")
    assert not hasattr(cursor(), "__jax_array__")
    assert hasattr(cursor(), "anything")  # any other name is a place


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda v: list(v), "a cursor has no iteration: it is a place in a tree of variables; sw.params"),
        (lambda v: "a" in v, "a cursor has no 'in'"),
        (lambda v: bool(v), "a cursor has no truth value"),
        (lambda v: len(v), "a cursor has no length"),
        (lambda v: v.a(np.ones(2)), "'a' is a place in a tree, not a function"),
        (lambda v: v.parm("w", (2,), zeros), "'parm' is a place in a tree, not a function; did you mean 'param'"),
        (lambda v: np.ones(2) * v.a, r"'a' is a place in a tree, not an array; v.param\(name, shape, init\) reads one"),
        (lambda v: jnp.ones((1, 2)) @ v.a, "'a' is a place in a tree, not an array"),
        (lambda v: v.a + 1, "'a' is a place in a tree, not an array"),
        (lambda v: jnp.dot(jnp.ones(2), v.a), "got <class 'sapwood.core.vars.Vars'>"),
        (lambda v: pickle.dumps(v), "a cursor is not saved; save the plain dicts"),
    ],
)
def test_what_a_cursor_is_not(use, message):
    with pytest.raises(TypeError, match=message):
        use(cursor())


def test_a_variable_is_no_attribute():
    message = r"a/w is a variable in params \(shape \(2,\)\) and is used as a scope: v.param\('w', shape"
    with pytest.raises(sw.DeclarationError, match=message):
        _ = np.ones(2) * cursor().a.w


def test_a_cursor_does_not_change():
    v = cursor()
    message = r"a cursor is immutable; v.put\(w=value\) hands back a state entry's next value"
    with pytest.raises(AttributeError, match=message):
        v.w = 1
    with pytest.raises(AttributeError, match=message):
        v["w"] = 1
    with pytest.raises(AttributeError, match="a cursor is immutable"):
        del v._path
    assert copy.copy(v) is v
    assert copy.deepcopy({"v": v})["v"] is v


def test_the_trees_given_are_left_alone():
    params, state = {"a": {"w": jnp.ones(2)}}, {"n": jnp.zeros(())}

    def model(v):
        n = v.state("n", (), zeros)
        v.put(n=n + 1)
        return v.a.param("w", (2,), zeros)

    before = jax.tree.map(id, (params, state))
    _, after = sw.apply(model, params, state)
    assert jax.tree.map(id, (params, state)) == before
    assert float(after["n"]) == 1


def test_initialisers_are_values():
    for make in (initializers.lecun_normal, initializers.glorot_uniform, lambda: initializers.normal(0.1)):
        assert make() == make()
        assert hash(make()) == hash(make())
    assert initializers.normal(0.1) != initializers.normal(0.2)


class Scale(sw.Layer):
    start: float = 1.0
    name: str = "scale"

    def __call__(self, v, x):
        return x * v.param(self.name, (x.shape[-1],), initializers.constant(self.start))


def test_layers_are_values():
    assert Scale(2.0) == Scale(start=2.0) != Scale()
    assert len({Scale(), Scale(1.0), Scale(2.0)}) == 2
    assert (repr(Scale()), repr(Scale(2.0)), repr(Scale(name="s"))) == (
        "Scale()",
        "Scale(start=2.0)",
        "Scale(name='s')",
    )
    assert pickle.loads(pickle.dumps(L.Dense(3))) == L.Dense(3)
    assert list(inspect.signature(Scale).parameters) == ["start", "name"]
    with pytest.raises(AttributeError, match="cannot assign to field 'start'"):
        Scale().start = 3.0  # pyright: ignore
    with pytest.raises(TypeError, match="Scale has no option 'stat'; did you mean 'start'"):
        Scale(stat=3.0)  # pyright: ignore


class Half(sw.Layer):
    size: dataclasses.InitVar[int] = 2
    width: int = dataclasses.field(init=False)

    def __post_init__(self, size):
        object.__setattr__(self, "width", size // 2)

    def __call__(self, v, x):
        return x


def test_a_layer_may_be_made_of_what_is_no_field():
    assert (Half(size=8).width, Half(8).width, Half()) == (4, 4, Half(size=2))
    with pytest.raises(TypeError, match="Half has no option 'width'"):
        Half(width=3)  # pyright: ignore
    with pytest.raises(TypeError, match=r"Half\(size\) was given 2 values"):
        Half(1, 2)  # pyright: ignore


def test_a_layer_given_no_cursor_says_so():
    message = r"Scale\(\) takes its variables first, then its inputs: expected a cursor or a dict .*, got ndarray"
    with pytest.raises(TypeError, match=rf"{message}\[2, 3\]"):
        Scale()(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(TypeError, match="got NoneType"):
        Scale()(None, np.ones(3))


def test_a_layer_without_a_call():
    class Empty(sw.Layer):
        width: int

    with pytest.raises(TypeError, match=r"Empty defines no __call__\(self, v, ...\)"):
        Empty(3)({}, 1)


def test_layers_inherit():
    class Twice(Scale):
        times: int = 2

        def __call__(self, v, x):
            return self.times * super().__call__(v, x)

    assert Twice(3.0) == Twice(start=3.0, times=2)
    assert np.array_equal(Twice()({"scale": np.full(2, 5.0, "float32")}, np.ones(2, "float32")), [10, 10])
    with pytest.raises(sw.DeclarationError) as caught:
        sw.apply(lambda v, x: Twice()(v.a, x), {"a": {"scale": np.ones(3)}}, {}, np.ones(2))
    notes = [note for note in caught.value.__notes__ if note.startswith("in ")]
    assert notes == ["in a: Twice() on float64[2]"]  # one layer, one note


def test_what_cannot_be_printed_does_not_hide_an_error():
    class Odd:
        def __repr__(self):
            raise RuntimeError("no words")

    @sw.layer
    def broken(v, x):
        raise ValueError("the real one")

    with pytest.raises(ValueError, match="the real one") as caught:
        sw.apply(lambda v, x: broken(v.up, x), {}, {}, Odd())
    assert "in up: Function" in caught.value.__notes__

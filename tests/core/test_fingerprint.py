"""What tells two moments of a notebook apart: each edit that changes what a model computes, and none that does not."""

import collections
import functools
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.fingerprint import fingerprint

CELL = """
import collections, dataclasses, functools, types
import jax, jax.numpy as jnp, numpy as np
import sapwood as sw
from sapwood import layers as L

scale, table, rates, names, config = 2.0, np.arange(4.0), {"a": [1, 2]}, {"a"}, types.SimpleNamespace(width=[8])
history, unused, queue, raw, digits = [], 0, collections.deque([1]), bytearray(b"ab"), {1, 2}
large = np.zeros(1_200_000, np.float32)
traced = jnp.ones(2)

def helper(x, by=1.0):
    return x * scale + by

@jax.jit
def jitted(x):
    return helper(x)

@jax.checkpoint
def kept(x):
    return helper(x)

@jax.custom_vjp
def derived(x):
    return x

derived.defvjp(lambda x: (x, None), lambda _, g: (helper(g),))

class Block(sw.Layer):
    width: int = 4
    def __call__(self, v, x):
        return self.inner(x)
    def inner(self, x):
        return x
    @property
    def size(self):
        return 1

@dataclasses.dataclass
class Options:
    deep: object = None

options = Options(Options([1]))
options.beside = 1

def noted(v, x):
    jax.debug.callback(lambda m: history.append(float(m)), x.mean())
    rates["n"] = 0
    rates["a"].append(1)
    rates.setdefault("b", []).append(1)
    rates["n"] += 1
    return x

def closed():
    log = []
    def f(x):
        jax.debug.callback(lambda m: log.append(m), x)
        return x
    return f

def counted():
    count = 0
    def more(x):
        nonlocal count
        count += 1
        return x
    return more

def model(v, x):
    return L.Dense(2)(v.o, helper(x))

def nested(v, x):
    return jax.lax.map(lambda row: jax.vmap(lambda one: helper(one))(row), x)

def of_module(v, x):
    return helpers.deep.block(x) + jax.nn.relu(x)

def imports(v, x):
    from notebook_helpers import block
    return block(x)

def relative(v, x):
    def inner(y):
        from . import helpers as own
        return own.block(y)
    return inner(x)

def beside(v, x):
    from .helpers import block
    return block(x)

def renamed(v, x):
    h = helpers
    return h.block(x)
"""


@pytest.fixture
def cell(monkeypatch):
    """The names of a notebook whose one cell has been run, with a module beside it."""
    names = {"__name__": "__main__"}
    exec(compile(CELL, "<cell 1>", "exec"), names)
    helpers = types.ModuleType("notebook_helpers")
    helpers.deep = helpers
    exec(compile("def block(x):\n    return x\nother = 1", "helpers.py", "exec"), vars(helpers))
    monkeypatch.setitem(sys.modules, "notebook_helpers", helpers)
    names |= {"helpers": helpers, "__package__": "notebook"}
    package = types.ModuleType("notebook")
    package.helpers = helpers
    monkeypatch.setitem(sys.modules, "notebook", package)
    monkeypatch.setitem(sys.modules, "notebook.helpers", helpers)
    return names


def run(names, code):
    exec(compile(code, "<cell 2>", "exec"), names)


EDITED = {  # what is asked about, and an edit that it has to see
    "a helper": ("model", "def helper(x, by=1.0): return x - scale"),
    "a default": ("model", "helper.__defaults__ = (2.0,)"),
    "a number": ("model", "scale = 3.0"),
    "a number of another type": ("model", "scale = 2"),
    "a sign of zero": ("lambda x: table[0] * zero", "zero = -0.0"),
    "a name that was not there": ("lambda x: later(x)", "def later(x): return x"),
    "a builtin covered": ("lambda x: max(x)", "max = min"),
    "in a lambda in a lambda": ("nested", "scale = 3.0"),
    "an array in place": ("lambda x: x * table", "table[2] = 7"),
    "an array of JAX's": ("lambda x: x * traced", "traced = traced + 1"),
    "deep in a dict": ("lambda x: rates", "rates['a'].append(3)"),
    "a set": ("lambda x: names", "names.add('b')"),
    "a deque": ("lambda x: queue", "queue.append(2)"),
    "a namespace": ("lambda x: config.width", "config.width[0] = 9"),
    "a dataclass": ("lambda x: options", "options.deep.deep.append(2)"),
    "what a jitted helper calls": ("lambda x: jitted(x)", "scale = 3.0"),
    "what a checkpointed helper calls": ("lambda x: kept(x)", "scale = 3.0"),
    "what a gradient calls": ("lambda x: derived(x)", "scale = 3.0"),
    "what a partial calls": ("functools.partial(helper, by=2.0)", "scale = 3.0"),
    "what a layer of a function calls": ("L.Sequential((sw.layer(model), L.Remat(sw.layer(model))))", "scale = 3.0"),
    "what an objective calls": ("sw.supervised(model)", "scale = 3.0"),
    "what a transformation of JAX's calls": ("jax.grad(jax.vmap(helper))", "scale = 3.0"),
    "a method": ("Block()", "Block.inner = lambda self, x: x + 1"),
    "a method of a layer in a model": ("lambda v, x: Block()(v, x)", "Block.inner = lambda self, x: x + 1"),
    "a property": ("Block()", "Block.size = property(lambda self: 2)"),
    "a bound method": ("Block().inner", "Block.inner.__code__ = (lambda self, x: -x).__code__"),
    "a cell that a closure holds": ("counted()", "f(0)"),
    "a function of a module": ("of_module", "helpers.block = lambda x: -x"),
    "a function of a module, in place": ("of_module", "helpers.block.__code__ = (lambda x: -x).__code__"),
    "what a function imports": ("imports", "helpers.block = lambda x: -x"),
    "what a function imports from its package": ("relative", "helpers.block = lambda x: -x"),
    "what a function imports from a module beside": ("beside", "helpers.block = lambda x: -x"),
    "a module of another name": ("renamed", "helpers.block.__code__ = (lambda x: -x).__code__"),
    "a number of a module of another name": ("renamed", "helpers.other = 2"),
    "an attribute by its name": ("lambda x: getattr(helpers, 'block')(x)", "helpers.block = lambda x: -x"),
    "an attribute of a dataclass that is no field": ("lambda x: options.beside", "options.beside = 2"),
    "bytes in place": ("lambda x: x * raw[0]", "raw[0] = 1"),
    "the numbers of a set": ("lambda x: x * (1 in digits)", "digits.clear(); digits.update({1.0, 2.0})"),
    "a large array": ("lambda x: x * large[0]", "large = np.zeros_like(large)"),
    "a large array in place": ("lambda x: x * large[0]", "large *= 0; large += 1"),
    "a container that is filled and read": ("lambda x: history.append(x) or len(history)", "history.append(1)"),
    "an item that is called": ("lambda x: rates['a'].update(x)", "rates['a'] = [2]"),
    "an item that is read by setdefault": ("lambda x: x * rates.setdefault('a', 2)", "rates['a'] = 3"),
    "items of one that is filled": ("lambda x: (rates.update(b=2), [*rates])", "rates['c'] = 3"),
    "a container that is handed on": ("lambda x: helper(x, history).append(1)", "history.append(1)"),
    "a function of JAX's": ("of_module", "jax = types.SimpleNamespace(nn=jax.nn)"),
}
SAME = {
    "the same cell again": ("model", CELL.split("@jax.jit")[0]),
    "a name that nobody reads": ("model", "unused = 1; del history"),
    "the name of an attribute": ("lambda v, x: v.history.put(unused=x.table)", "history = [1]; unused = 1; table = 2"),
    "something else in the module": ("of_module", "helpers.other = 2"),
    "what a model fills": ("noted", "history.append(1); rates['n'] = 3; rates['a'].append(2); rates['b'] = [1]"),
    "what a function of a function fills": ("closed()", "f.__closure__[0].cell_contents.append(1)"),
    "a large array as it was": ("lambda x: x * large[0]", "other = large[:10]"),
    "a model that was called": ("sw.supervised(model)", "sw.spec(model, jnp.ones((1, 2)))"),
}


@pytest.mark.parametrize("what", EDITED)
def test_an_edit_is_seen(cell, what):
    root, edit = EDITED[what]
    run(cell, f"zero = 0.0\nf = {root}")
    before = fingerprint(cell["f"])
    assert before == fingerprint(cell["f"])
    run(cell, edit)
    assert before != fingerprint(cell["f"])


@pytest.mark.parametrize("what", SAME)
def test_what_changes_nothing_is_the_same(cell, what):
    root, edit = SAME[what]
    run(cell, f"f = {root}")
    before = fingerprint(cell["f"])
    if what == "the same cell again":
        exec(compile(edit, "<cell 1>", "exec"), cell)
    else:
        run(cell, edit)
    assert before == fingerprint(cell["f"])


def test_circles_and_what_shows_nothing_of_itself():
    circle = [1]
    circle.append(circle)
    f = lambda: circle  # noqa: E731
    f.itself = f
    one, other = object(), object()
    assert fingerprint(f) == fingerprint(f)
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)
    assert fingerprint(float("nan"), np.nan) == fingerprint(np.float64("nan").item(), float("nan"))
    assert fingerprint([1, [2]]) != fingerprint([1], [2])
    assert fingerprint([[], 1]) != fingerprint([[1]])


def test_nothing_that_was_freed_is_taken_for_another():
    arrays = np.array([np.arange(3), np.arange(4)], dtype=object)  # its list is made for each look
    assert fingerprint(arrays, [arrays]) == fingerprint(arrays, [arrays])
    before = fingerprint(lambda: arrays)
    arrays[1] = np.arange(5)
    assert before != fingerprint(lambda: arrays)


def test_what_an_object_keeps_of_its_value_is_no_edit():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "x")
    before = fingerprint(mesh)
    assert jax.sharding.NamedSharding(mesh, jax.P("x")).mesh.shape == {"x": 2}
    assert mesh.size == mesh.local_mesh.size == 2
    assert str(mesh)
    assert before == fingerprint(mesh) == fingerprint(jax.sharding.Mesh(np.array(jax.devices()[:2]), "x"))
    assert fingerprint(jax.P("x"), Path("a")) == fingerprint(jax.P("x"), Path("a"))
    assert before != fingerprint(jax.sharding.Mesh(np.array(jax.devices()[1:3]), "x"))


def test_installed_code_is_taken_as_it_is():
    found = fingerprint(jax.nn.gelu, L.Dense(2), jnp.float32, collections.Counter, functools.partial(np.sum, axis=0))
    assert len(found) < 200
    model = lambda v, x: L.Dense(2)(v.o, jax.nn.gelu(x)) + jnp.sum(x)  # noqa: E731
    assert len(fingerprint(sw.supervised(model))) < 150

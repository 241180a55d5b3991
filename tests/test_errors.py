"""The mistakes people really make, and the message each one gets: where, what came, what was expected, what to do."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.initializers import zeros

X = np.ones((4, 8), "float32")


class Mistake(NamedTuple):
    """What was done, the exception, what its message holds, and the places its notes name from inside out."""

    run: object
    error: type
    says: str
    notes: tuple = ()


@sw.layer
def block(v, x):
    return x + L.Dense(8)(v.up, jnp.tanh(L.Dense(16)(v.down, x)))


def network(v, x):
    for i in range(2):
        x = block(v.blocks[i], x)
    return L.Dense(3)(v.head, x)


@sw.layer
def unfit(v, x):
    """JAX itself raises here: the shapes do not add up."""
    return L.Dense(16)(v.wide, x) + x


class Reshape(sw.Layer):
    width: int

    def __call__(self, v, x):
        return x.reshape(x.shape[0], self.width)


class Branch(sw.Layer):
    """A Python `if` over a traced value."""

    def __call__(self, v, x):
        return x if x.sum() > 0 else -x


def trees(model=network, *xs):
    spec = sw.spec(model, *(xs or (X,)))
    return jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), tuple(spec))


def apply(model, *xs, **options):
    return sw.apply(model, *trees(model, *xs), *xs, **options)


def with_entry(path, value):
    """The network's parameters with one entry replaced; None takes it away."""
    params, _ = trees()
    node = params
    for name in path[:-1]:
        node = node[name]
    node.pop(path[-1]) if value is None else node.update({path[-1]: value})
    return params


MISTAKES = {
    # shapes and dtypes of inputs
    "features changed between init and apply": Mistake(
        lambda: sw.apply(network, *trees(), np.ones((4, 6), "float32")),
        sw.DeclarationError,
        "params blocks/0/down/kernel: the model declares shape (6, 16), the bound array has (8, 16)",
        ("in blocks/0/down: Dense(features=16) on float32[4,6]", "in blocks/0: block on float32[4,6]"),
    ),
    "shapes that do not add up inside a layer": Mistake(
        lambda: apply(lambda v, x: unfit(v.mix, x), X),
        TypeError,
        "add got incompatible shapes for broadcasting: (4, 16), (4, 8)",
        ("in mix: unfit on float32[4,8]",),
    ),
    "an impossible reshape, two layers deep": Mistake(
        lambda: sw.spec(lambda v, x: L.Sequential([Reshape(5)])(v.net, x), X),
        TypeError,
        "cannot reshape array of shape (4, 8)",
        (
            "in net/0: Reshape(width=5) on float32[4,8]",
            "in net: Sequential(layers=(Reshape(width=5),)) on float32[4,8]",
        ),
    ),
    "a Python if over a traced value": Mistake(
        lambda: jax.jit(lambda x: sw.apply(lambda v, x: Branch()(v.gate, x), {}, {}, x))(X),
        jax.errors.TracerBoolConversionError,
        "Attempted boolean conversion of traced array",
        ("in gate: Branch() on float32[4,8]",),
    ),
    "an image without its batch": Mistake(
        lambda: apply(lambda v, x: L.Conv(4, (3, 3))(v.conv, x), np.ones((28, 28), "float32")),
        sw.InputError,
        "Conv expects (batch, height, width, channels), got float32[28,28] of rank 2; add the missing dimensions",
        ("in conv: Conv(features=4, kernel_size=(3, 3)) on float32[28,28]",),
    ),
    "images as bytes": Mistake(
        lambda: apply(network, np.ones((4, 8), "uint8")),
        sw.InputError,
        'expects floating numbers, got uint8[4,8]; convert them first, 8-bit images with x.astype("float32") / 255',
    ),
    "an id outside the table": Mistake(
        lambda: apply(lambda v, ids: L.Embed(10, 4)(v.words, ids), np.array([[1, 2], [3, 10]])),
        sw.CheckError,
        "words: id outside [0, 10) at entry 1, 1",
    ),
    # trees
    "a parameter that is missing": Mistake(
        lambda: sw.apply(network, with_entry(("blocks", "1", "up", "kernel"), None), {}, X),
        sw.DeclarationError,
        "params has no 'blocks/1/up/kernel' (shape (16, 8), float32); at 'blocks/1/up' it holds bias",
        ("in blocks/1/up: Dense(features=8) on float32[4,16]", "in blocks/1: block on float32[4,8]"),
    ),
    "a tree of another model": Mistake(
        lambda: sw.apply(network, {"encoder": {"kernel": X}}, {}, X),
        sw.DeclarationError,
        "params has no 'blocks/0/down/kernel' (shape (8, 16), float32); at '(root)' it holds encoder",
    ),
    "an entry that nothing uses": Mistake(
        lambda: sw.apply(network, with_entry(("haed",), {"kernel": X}), {}, X),
        sw.DeclarationError,
        "'network' declares no params haed/kernel",
    ),
    "a layer's tree in the place of an array": Mistake(
        lambda: sw.apply(network, with_entry(("head", "kernel"), {"kernel": X}), {}, X),
        sw.DeclarationError,
        "head/kernel is declared as a variable of shape (8, 3), but params holds a scope there with kernel",
    ),
    "params and state in one": Mistake(
        lambda: sw.apply(network, trees(), {}, X),
        TypeError,
        "params must be a nested dict of arrays, got tuple",
    ),
    "spec in the place of init": Mistake(
        lambda: sw.apply(network, *sw.spec(network, X), X),
        sw.DeclarationError,
        "holds Param, an array is expected; sw.spec only describes variables, sw.init makes them",
    ),
    "no state for batch norm": Mistake(
        lambda: sw.apply(lambda v, x: L.BatchNorm()(v.norm, x), {"norm": {"scale": X[0], "bias": X[0]}}, {}, X),
        sw.DeclarationError,
        "state has no 'norm/mean' (shape (8,), float32)",
    ),
    # cursors and layers
    "no cursor": Mistake(
        lambda: L.Dense(3)(X),
        TypeError,
        "Dense(features=3) takes its variables first, then its inputs: expected a cursor or a dict of arrays",
    ),
    "inputs before variables": Mistake(
        lambda: apply(lambda v, x: L.Dense(3)(x, v.head), X),
        TypeError,
        "takes its variables first, then its inputs",
    ),
    "the cursor as hyper-parameter": Mistake(
        lambda: apply(lambda v, x: L.Dense(v.head)(v.head, x), X),
        sw.ConfigError,
        "Dense: features must be an integer above 0, got Vars(head: empty)",
    ),
    "a layer class in Sequential": Mistake(
        lambda: L.Sequential([L.Flatten, L.Dense(3)]),
        sw.ConfigError,
        "'0' must be a layer or a function of arrays, got <class "
        "'sapwood.layers.spatial.flatten.Flatten'>; write Flatten()",
    ),
    "one place for two layers": Mistake(
        lambda: sw.spec(lambda v, x: L.Dense(3)(v.dense, L.Dense(8)(v.dense, L.Dense(16)(v.wide, x))), X),
        sw.DeclarationError,
        "dense/kernel is declared twice with a different shape: first (16, 8), now (8, 3); variables that share a path",
        ("in dense: Dense(features=3) on float32[4,8]",),
    ),
    "a parameter as an attribute": Mistake(
        lambda: sw.apply(lambda v, x: x @ v.head.kernel, {"head": {"kernel": X.T}}, {}, X),
        sw.DeclarationError,
        "head/kernel is a variable in params (shape (8, 4)) and is used as a scope: v.param('kernel', shape",
    ),
    "a cursor as an array": Mistake(
        lambda: sw.spec(lambda v, x: x @ v.head, X),
        TypeError,
        "'head' is a place in a tree, not an array; v.param(name, shape, init) reads one",
    ),
    "a misspelt method": Mistake(
        lambda: sw.spec(lambda v, x: v.parm("kernel", (8, 3), zeros), X),
        TypeError,
        "'parm' is a place in a tree, not a function; did you mean 'param'?",
    ),
    "a cursor written to": Mistake(
        lambda: sw.spec(lambda v, x: setattr(v, "mean", x), X),
        AttributeError,
        "a cursor is immutable; v.put(mean=value) hands back a state entry's next value",
    ),
    "a loop variable of a fori_loop as an index": Mistake(
        lambda: sw.spec(lambda v, x: jax.lax.fori_loop(0, 3, lambda i, x: block(v.blocks[i], x), x), X),
        sw.DeclarationError,
        "a traced index needs v.stack(n) and a scan",
    ),
    # randomness and effects
    "training without a key": Mistake(
        lambda: sw.apply(lambda v, x: L.Dropout(0.5)(v.drop, x), {}, {}, X, train=True),
        sw.EffectError,
        "drop: rng('mask') needs a key: pass rng= to sw.apply or sw.bind",
        ("in drop: Dropout(rate=0.5) on float32[4,8]",),
    ),
    "a key that is none": Mistake(
        lambda: sw.init(network, "0", X),
        sw.ConfigError,
        "expected a random key (jax.random.key(0)) or an integer seed, got '0'",
    ),
    "dropout in a vmap": Mistake(
        lambda: sw.apply(
            lambda v, x: jax.vmap(lambda row: L.Dropout(0.5)(v.drop, row))(x), {}, {}, X, rng=0, train=True
        ),
        sw.EffectError,
        "rng('mask') cannot draw: its key belongs to another JAX trace, and every row would get the same numbers. "
        'Give each its own: jax.vmap(lambda key, x: f(v.replace(rng=key), x))(jax.random.split(v.rng("rows"), n), x)',
    ),
    "batch norm in a checkpoint": Mistake(
        lambda: sw.spec(lambda v, x: jax.checkpoint(lambda x: L.BatchNorm()(v.norm, x))(x), X),
        sw.EffectError,
        "norm: put(mean=...) cannot work: it belongs to another JAX trace (jit, grad, vmap, scan",
        ("in norm: BatchNorm() on float32[4,8]",),
    ),
    "a state entry of another shape": Mistake(
        lambda: sw.spec(lambda v, x: (v.state("mean", (8,), zeros), v.put(mean=x)), X),
        sw.DeclarationError,
        "put(mean=...) at '(root)': declared float32[8], got float32[4, 8]; a state entry keeps its shape and dtype",
    ),
    "an auxiliary loss that goes nowhere": Mistake(
        lambda: sw.apply(lambda v, x: v.reg.loss("l2", x.sum()), {}, {}, X, train=True),
        sw.EffectError,
        "the auxiliary losses reg/l2 would be lost: only sw.pure(f)(v, ...) hands back updates.losses",
    ),
    # options
    "a dtype that is none": Mistake(
        lambda: sw.apply(network, *trees(), X, policy="bf16"),
        sw.ConfigError,
        "a precision must be a floating dtype such as 'float32', 'bfloat16' or 'float16', not 'bf16'",
    ),
    "a rate that is a percentage": Mistake(
        lambda: L.Dropout(50),
        sw.ConfigError,
        "Dropout: rate must be a number in [0, 1), got 50",
    ),
    "a parameter shaped by an input": Mistake(
        lambda: jax.jit(lambda n: sw.spec(lambda v, n: v.param("w", (n,), zeros), n))(3),
        sw.DeclarationError,
        "w: a variable's shape must be plain integers",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_and_its_message(what):
    mistake = MISTAKES[what]
    with pytest.raises(mistake.error) as caught:
        mistake.run()
    assert mistake.says in str(caught.value)
    notes = [note for note in getattr(caught.value, "__notes__", ()) if note.startswith("in ")]
    assert tuple(notes[: len(mistake.notes)]) == mistake.notes
    assert len(notes) == len(set(notes))


def test_every_error_of_ours_is_the_builtin_that_fits():
    for error in (sw.DeclarationError, sw.CheckError, sw.ConfigError, sw.DataError):
        assert issubclass(error, sw.SapwoodError)
        assert issubclass(error, ValueError)
    for error in (sw.EffectError, sw.CheckpointError):
        assert issubclass(error, sw.SapwoodError)
        assert issubclass(error, RuntimeError)

"""Contract 10: scanned and unrolled stacks are one thing, in trees, shapes and messages."""

import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L

UNROLLED = {str(i): {"up": {"kernel": np.full((2, 2), i, "float32"), "bias": np.zeros(2)}} for i in range(12)}


def test_there_and_back():
    scanned = sw.stack(UNROLLED)
    assert scanned["up"]["kernel"].shape == (12, 2, 2)
    assert scanned["up"]["kernel"][11, 0, 0] == 11  # numbers sort as numbers
    again = sw.unstack(scanned)
    assert list(again) == [str(i) for i in range(12)]
    assert np.array_equal(again["10"]["up"]["kernel"], UNROLLED["10"]["up"]["kernel"])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, r"has the children '0', '1', ..., this tree has \[\]"),
        ({"0": {}, "2": {}}, r"this tree has \['0', '2'\]"),
        ({"up": {"w": np.ones(2)}}, r"this tree has \['up'\]"),
        ({"0": {"w": np.ones(2, "f")}, "1": {"w": np.ones(3, "f")}}, r"1/w is float32\[3\], but 0/w is float32\[2\]"),
        ({"0": {"w": np.ones(2, "f")}, "1": {"b": np.ones(2, "f")}}, r"1/b is float32\[2\], but 0/b is nothing"),
        ({"0": {"w": np.ones(2, "f")}, "1": {"w": np.ones(2, "i")}}, r"1/w is int32\[2\], but 0/w is float32\[2\]"),
    ],
)
def test_what_does_not_stack(tree, message):
    with pytest.raises(sw.DeclarationError, match=message):
        sw.stack(tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"a": np.ones((2, 3)), "b": np.ones((3, 3))},
            "one leading size in all its leaves, .* has 2 at a, 3 at b",
        ),
        ({"a": np.ones(())}, "this tree has no at a"),
        ({}, "this tree has none"),
    ],
)
def test_what_does_not_unstack(tree, message):
    with pytest.raises(sw.DeclarationError, match=message):
        sw.unstack(tree)


def test_stack_checks_its_leaves():
    for leaf in (np.ones(3), np.ones(())):
        with pytest.raises(sw.DeclarationError, match=r"state a/b/n has shape \(.*\); stack\(4\) expects 4 along"):
            sw.bind({}, {"a": {"b": {"n": leaf}}}).a.stack(4)


def test_stacks_in_stacks():
    inner = L.Scan(L.Dense(2, bias=False), 3)
    params = {"kernel": np.tile(2 * np.eye(2, dtype="float32"), (2, 3, 1, 1))}
    y = L.Vmap(inner, 2, in_axes=None)(params, jnp.ones(2))
    assert np.array_equal(y, np.full((2, 2), 8))


def test_what_is_on_the_host_is_stacked_there():
    tree = {str(i): {"w": np.full((2, 3), i, "float32")} for i in range(3)}
    stacked = sw.stack(tree)["w"]
    assert isinstance(stacked, np.ndarray)
    assert (stacked == np.arange(3).reshape(3, 1, 1)).all()
    mixed = sw.stack({"0": {"w": np.ones(2, "float32")}, "1": {"w": jnp.ones(2)}})
    assert isinstance(mixed["w"], type(jnp.ones(2)))

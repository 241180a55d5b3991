"""Contract 11: core knows no mesh: activations ask an opaque function where they live."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sapwood as sw
from sapwood import layers as L

X = jnp.ones((8, 4))


def place_on(mesh, asked=None):
    def place(axes, shape):
        if asked is not None:
            asked.append((axes, shape))
        return NamedSharding(mesh, PartitionSpec("data")) if axes[0] == "batch" else None

    return place


def model(v, x):
    return v.shard(x, "batch", None) * 2, v.inner.shard(x, None, "embed")


def test_without_a_mesh_nothing_happens():
    assert sw.pure(lambda v, x: v.shard(x, "batch", None) is x)(sw.bind({}), X)[0]


def test_the_place_is_asked_by_axes_and_shape():
    mesh, asked = Mesh(jax.devices(), ("data",)), []
    (y, z), _ = jax.jit(lambda x: sw.apply(model, {}, {}, x, place=place_on(mesh, asked)))(X)
    assert asked[:2] == [(("batch", None), (8, 4)), ((None, "embed"), (8, 4))]
    assert y.sharding.spec == PartitionSpec("data")
    assert z.shape == (8, 4)


def test_it_crosses_transforms():
    mesh, asked = Mesh(jax.devices(), ("data",)), []
    block = lambda v, x: v.shard(x, "batch", None)  # noqa: E731
    jax.eval_shape(lambda x: sw.apply(lambda v, x: L.Scan(block, 2)(v.b, x), {}, {}, x, place=place_on(mesh, asked)), X)
    assert asked[0] == (("batch", None), (8, 4))


def test_every_dimension_is_named():
    with pytest.raises(sw.DeclarationError, match=r"here: shard got 1 axis names \('batch',\) for an array of shape"):
        sw.bind({}).here.shard(X, "batch")


def test_core_holds_no_global_state(root):
    """No mesh, no current model, no counter: a cursor carries all there is."""
    for file in (root / "core").glob("*.py"):
        text = file.read_text()
        for word in ("threading", "contextvars", "    global ", "import sapwood.parallel", "from sapwood.layers"):
            assert word not in text, f"{file.name} has {word!r}"

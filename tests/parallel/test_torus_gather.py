"""Gathers over a whole torus go in two steps: which meshes are cut, and that nothing else changes."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from stand_in_chips import chips

import sapwood as sw
from sapwood import layers as L
from sapwood.parallel import torus_gather
from sapwood.parallel.topologies import ENVIRONMENT


@pytest.mark.parametrize(
    ("topology", "text", "expected"),
    [
        ("v5p:4x4x4", "fsdp=64", {"fsdp": 16, "fsdp_inside": 4}),
        ("v5p:4x4x4", "data=4,fsdp=16", None),  # within a plane
        ("v5p:4x4x4", "fsdp=8,tensor=8", None),
        ("v5e:4x4", "fsdp=16", None),  # there is no third dimension
        ("v6e:8x8", "fsdp=64", None),
    ],
)
def test_which_axes_are_cut(topology, text, expected):
    mesh = sw.mesh(text, devices=chips(topology, 1))
    finer = torus_gather.split_axis(mesh, "fsdp")
    if expected is None:
        spans = torus_gather._dimensions(
            np.moveaxis(mesh.devices, mesh.axis_names.index("fsdp"), -1).reshape(-1, mesh.shape["fsdp"])
        )
        assert finer is None
        assert spans <= 2
        return
    assert dict(finer.shape) == expected
    assert list(finer.devices.flat) == list(mesh.devices.flat)
    for axis in expected:
        groups = np.moveaxis(finer.devices, finer.axis_names.index(axis), -1).reshape(-1, finer.shape[axis])
        assert torus_gather._dimensions(groups) <= 2


def test_a_mesh_of_other_devices_is_not_cut():
    assert torus_gather.split_axis(sw.mesh("fsdp=8"), "fsdp") is None
    assert torus_gather.split_axis(jax.sharding.AbstractMesh((64,), ("fsdp",)), "fsdp") is None
    with pytest.warns(sw.parallel.MeshWarning):
        mesh = sw.mesh("fsdp=128", devices=chips("v5p:4x4x4", 2))
    assert torus_gather.split_axis(mesh, "fsdp") is None  # over slices: not tried


def test_values_and_gradients_are_the_same_where_an_axis_is_cut(monkeypatch):
    """Eight CPU devices seen as if theirs were a torus."""
    mesh = sw.mesh("fsdp=8")
    finer = Mesh(mesh.devices.reshape(4, 2), ("fsdp", "fsdp_inside"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = np.random.default_rng(0).normal(size=(8, 128)).astype("f")
    model = L.Scan(L.Dense(128, axes=("embed", "mlp")), 3)
    params, _ = sw.parallel.init(model, 0, x, mesh=mesh)
    place = sw.parallel.placement(mesh)

    def loss(params, x):
        y, _ = sw.apply(lambda v, x: v.shard(model(v, x), "batch", "embed"), params, {}, x, place=place)
        return jnp.sum(jnp.sin(y))

    given = params, jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp")))
    plain = jax.jit(jax.grad(loss)).lower(*given).compile()
    monkeypatch.setattr(torus_gather, "split_axis", lambda mesh, axis: finer if axis == "fsdp" else None)
    cut = jax.jit(jax.grad(lambda *args: loss(*args))).lower(*given).compile()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), cut(*given), plain(*given))
    one, two = (sw.parallel.collectives(program, mesh) for program in (plain, cut))
    assert {c.size for c in one.of("all-gather")} == {8}
    assert {c.size for c in two.of("all-gather") if c.nbytes > 4 * 128 * 128 // 8} == {2, 4}


def test_without_jit_an_axis_is_not_cut(monkeypatch):
    """Operations that run by themselves fail on arrays of two meshes."""
    mesh = sw.mesh("fsdp=8")
    finer = Mesh(mesh.devices.reshape(4, 2), ("fsdp", "fsdp_inside"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    monkeypatch.setattr(torus_gather, "split_axis", lambda mesh, axis: finer if axis == "fsdp" else None)
    place, x = sw.parallel.placement(mesh), np.ones((8, 128), "f")
    params, _ = sw.parallel.init(L.Dense(128), 0, x, mesh=mesh)

    def loss(params):
        return jnp.sum(sw.apply(L.Dense(128), params, {}, x, place=place)[0] ** 2)

    grads = jax.grad(loss)(params)
    assert grads["kernel"].sharding.mesh == mesh
    y = x @ np.asarray(params["kernel"])
    np.testing.assert_allclose(params["kernel"] + grads["kernel"], params["kernel"] + 2 * x.T @ y, atol=1e-4)


CHILD = """
import json, jax, optax, sapwood as sw
from sapwood import layers as L
from sapwood.train import supervised
from sapwood.train.state.plan import plan as plan_state

def model(v, x):
    def block(v, x):
        h = v.shard(jax.nn.silu(L.Dense(8192, axes=("embed", "mlp"))(v.up, x)), "batch", "mlp")
        return v.shard(x + L.Dense(4096, axes=("mlp", "embed"))(v.down, h), "batch", "embed")
    return L.Scan(block, 2, remat="full")(v.blocks, x)

mesh = sw.mesh("fsdp=64", devices=sw.parallel.topology("v5p:4x4x4"))
objective = supervised(model, inputs="x", loss="squared_error")
train = sw.Trainer(objective, optax.sgd(0.1), mesh=mesh, policy="bfloat16", checks=False)
batch = {k: jax.ShapeDtypeStruct((4096, 4096), "float32", sharding=train.batch_sharding) for k in ("x", "label")}
plan = plan_state(train, batch)
program = train.compiled.train(plan.shardings).lower(plan.shapes, batch).compile()
found = sw.parallel.collectives(program, mesh)
print(json.dumps([[row[0], row[2], row[5]] for row in found.rows()]))
"""


@pytest.mark.slow
@pytest.mark.fresh_compile
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "sapwood[plan]"'
)
def test_fsdp_over_a_torus_gathers_and_scatters():
    """4096 wide: in a model 2048 wide the gradient of `down` stays a whole sum, of a plane."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {kind: sent for kind, _, sent in json.loads(done.stdout.splitlines()[-1])}
    whole = 2 * 2 * 4096 * 8192 * 2  # bytes of two blocks of two kernels in bfloat16
    assert found["all-gather"] >= 1.9 * whole * 63 / 64
    assert found["reduce-scatter"] >= 0.9 * whole * 15 / 16
    assert sum(found.values()) < 3.2 * whole  # 6 where each is a whole sum

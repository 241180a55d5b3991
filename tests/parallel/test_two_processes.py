"""Two real processes joined by `jax.distributed` (gloo): shardings, batches from each process's rows, one update."""

import functools
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = r"""
import json, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, index, *layouts = sys.argv[1:]
if port != "0":
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
import jax.numpy as jnp, numpy as np, optax
import sapwood as sw
from dataclasses import replace
from sapwood import parallel

def model(v, x):
    h = x @ v.up.param("kernel", (16, 32), jax.nn.initializers.normal(0.1), axes=("embed", "mlp"))
    mean = v.norm.state("mean", (32,), jax.nn.initializers.zeros)
    v.norm.put(mean=0.5 * mean + 0.5 * h.mean(0))  # over the rows of both processes
    return v.shard(jnp.tanh(h), "batch", "mlp") @ v.down.param("kernel", (32, 4), jax.nn.initializers.normal(0.1))

def layout(text):
    mesh, rules = parallel.mesh(text), replace(parallel.DEFAULT, min_size=16)
    x = np.random.RandomState(0).randn(8, 16).astype("f")
    y = np.random.RandomState(1).randn(8, 4).astype("f")
    sharding = parallel.batch_sharding(mesh)
    part = parallel.feed(sharding)
    rows = slice(part.index * 8 // part.count, (part.index + 1) * 8 // part.count)
    batch = parallel.put_batch({"x": x[rows], "y": y[rows]}, sharding)
    assert batch["x"].shape == (8, 16)
    params, state = parallel.init(model, 0, x, mesh=mesh, rules=rules)
    optimizer = optax.adam(1e-2)
    place, whole = parallel.placement(mesh, rules), parallel.replicated(mesh)
    spec = sw.spec(model, x).params
    opts = parallel.opt_shardings(optimizer, spec, parallel.param_shardings(spec, mesh, rules), mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=opts)(params)

    def step(params, state, opt_state, batch):
        def loss(params):
            out, new = sw.apply(model, params, state, batch["x"], train=True, place=place)
            return ((out - batch["y"]) ** 2).mean(), new
        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, _ = optimizer.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), new

    value, params, state = jax.jit(step, out_shardings=whole)(params, state, opt_state, batch)
    message = ""
    if parallel.shards(sharding) == 4:  # two rows cannot be split over four devices, whichever process brings them
        try:
            parallel.put_batch({"x": x[:1], "y": y[:1]}, sharding)
        except parallel.batches.ConfigError as error:
            message = str(error)
    print(json.dumps({
        "devices": jax.device_count(), "loss": float(value), "feed": part, "message": message,
        "mean": np.asarray(state["norm"]["mean"]).tolist(), "down": np.asarray(params["down"]["kernel"]).tolist(),
    }))

for text in layouts:
    layout(text)
"""


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


LAYOUTS = {
    "data=2,fsdp=2": [[0, 2], [1, 2]],
    "fsdp=4": [[0, 2], [1, 2]],
    "tensor=4": [[0, 1], [0, 1]],  # no data axis: both processes feed every row
    "data=2,tensor=2": [[0, 2], [1, 2]],
}
"""Of each mesh, the part of a batch that each process feeds."""


@functools.cache
def _run(processes):
    """What the program found for each layout, from each process; four devices in all."""
    port = _free_port() if processes > 1 else 0
    flags = f"--xla_force_host_platform_device_count={4 // processes}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(port)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    running = [subprocess.Popen([*command, str(i), *LAYOUTS], **options) for i in range(processes)]
    try:
        results = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, err) in zip(running, results, strict=True):
        assert process.returncode == 0, err[-3000:]
    lines = ([line for line in out.splitlines() if line.startswith("{")] for out, _ in results)
    return [dict(zip(LAYOUTS, map(json.loads, each), strict=True)) for each in lines]


@pytest.mark.slow
@pytest.mark.parametrize("text", LAYOUTS)
def test_two_processes_have_the_numbers_of_one(text):
    one, *two = (found[text] for found in (*_run(1), *_run(2)))
    assert [result["feed"] for result in two] == LAYOUTS[text]
    for result in two:
        assert result["devices"] == 4
        np.testing.assert_allclose(result["loss"], one["loss"], 1e-6)
        np.testing.assert_allclose(result["mean"], one["mean"], 1e-5, 1e-7)
        np.testing.assert_allclose(result["down"], one["down"], 1e-4, 1e-6)
    if "fsdp" in text:
        assert all("batch size 2 is smaller than the 4 shards" in result["message"] for result in two)

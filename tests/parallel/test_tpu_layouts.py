"""What the layouts become on a TPU, compiled ahead of time: host memory, pieces of moments, and what crosses slices."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from sapwood.parallel.topologies import ENVIRONMENT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.fresh_compile,  # as it is for a TPU
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "sapwood[plan]"'
    ),
]

CHILD = """
import json, re, sys
import jax, optax, sapwood as sw
from sapwood import layers as L
from sapwood.train import supervised
from sapwood.train.state.plan import plan as plan_state

name, slices, mesh = sys.argv[1], int(sys.argv[2]), sys.argv[3]

@sw.layer
def model(v, x):
    x = jax.nn.relu(L.Dense(1024, axes=("embed", "mlp"))(v.up, x))
    return L.Dense(512, axes=("mlp", "embed"))(v.down, x)

made = sw.mesh(mesh, devices=sw.parallel.topology(name, slices))
KINDS = "(?:all-gather|all-reduce|reduce-scatter|all-to-all)"
for options in json.loads(sys.argv[4]):
    train = sw.Trainer(supervised(model, inputs="x"), optax.adam(1e-3), mesh=made, **options)
    shapes = {"x": ((64, 512), "float32"), "label": ((64,), "int32")}
    batch = {k: jax.ShapeDtypeStruct(*x, sharding=train.batch_sharding) for k, x in shapes.items()}
    plan = plan_state(train, batch)
    program = train.compiled.train(plan.shardings).lower(plan.shapes, batch).compile()
    memory, text = program.memory_analysis(), program.as_text()
    outer = [[d.slice_index for d in part.flat] for part in made.devices] if slices > 1 else []
    groups = re.findall(KINDS + r"(?:-start)?\\(.*?replica_groups=(\\S+)", text)
    print(json.dumps({"device": memory.argument_size_in_bytes, "host": memory.host_argument_size_in_bytes,
                      "labels": text.count("S(5)"), "outer": outer, "groups": groups}))
"""


def compiled(name, slices, mesh, *options):
    """What one process found of a trainer with each of these options."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, name, str(slices), mesh, json.dumps(options)],
        env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_moments_in_pieces_and_in_host_memory():
    options = {"rules": "data"}, {"rules": "zero1"}, {"rules": "data", "offload": "optimizer"}
    plain, zero, off = compiled("v5e:2x2", 1, "data=4", *options)
    params = 2 * 512 * 1024 * 4
    assert plain["device"] > 3 * params
    assert plain["host"] == plain["labels"] == 0
    assert zero["device"] < 1.6 * params  # the parameters, and a quarter of two moments
    assert off["device"] < 1.1 * params
    assert off["host"] >= 2 * params
    assert off["labels"] > 0


def test_only_replicas_cross_the_slices():
    (found,) = compiled("v5e:2x2", 2, "replica=2,fsdp=2,tensor=2", {"rules": "replica+fsdp+tensor"})
    assert [set(part) for part in found["outer"]] == [{0}, {1}]
    # a program is that of one slice, of devices 0 to 3; what crosses is sent by the runtime
    assert found["groups"]
    assert set(found["groups"]) <= {"{{0,1},{2,3}},", "{{0,2},{1,3}},"}


CONVOLUTIONS = """
import jax, optax, sapwood as sw
from sapwood import layers as L
from sapwood.train import supervised
from sapwood.train.state.plan import plan as plan_state

def model(v, x):
    def block(v, x):
        return x + L.LayerNorm()(v.norm, L.Conv(8, (3, 3))(v.conv, x))
    return L.Dense(10)(v.head, L.Scan(block, 4)(v.blocks, x).mean((1, 2)))

mesh = sw.mesh("data=4", devices=sw.parallel.topology("v5e:2x2"))
train = sw.Trainer(supervised(model, inputs="x"), optax.adam(1e-3), mesh=mesh)
shapes = {"x": ((8, 16, 16, 8), "float32"), "label": ((8,), "int32")}
batch = {k: jax.ShapeDtypeStruct(*x, sharding=train.batch_sharding) for k, x in shapes.items()}
plan = plan_state(train, batch)
for step in (train.compiled.train(plan.shardings), jax.jit(train.step)):
    text = step.lower(plan.shapes, batch).as_text()
    print("optimization_barrier" in text, "inlineable" in text, text.count("stablehlo.while"))
"""


def test_what_is_for_a_cpu_is_not_in_the_program_of_a_tpu():
    """Where the program is compiled on a CPU: nothing is held back from fusion, and convolutions stay in their loop."""
    done = subprocess.run(
        [sys.executable, "-c", CONVOLUTIONS], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["False", "False", "2"] * 2  # a loop forward, a loop backward

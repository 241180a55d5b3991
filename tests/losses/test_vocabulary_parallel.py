"""A vocabulary split over devices: neither the table nor the logits ever travel, and the numbers are the same."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood import metrics as M
from sapwood.core.layer import Layer
from sapwood.parallel import DEFAULT
from sapwood.parallel.topologies import ENVIRONMENT
from sapwood.train.objectives.next_token import next_token

VOCABULARY, WIDTH = 256, 8
RULES = dataclasses.replace(DEFAULT, min_size=1)  # else a table of this size is left whole
RANDOM = np.random.default_rng(0)
BATCH = {name: jnp.asarray(RANDOM.integers(0, VOCABULARY, (8, 8))) for name in ("tokens", "targets")}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


class Bigram(Layer):
    """The ends of a language model, and nothing between."""

    def __call__(self, v, tokens):
        return v.shard(self.features(v, tokens) @ self.head(v)[0], "batch", "length", "vocab")

    def features(self, v, tokens):
        return v.shard(L.Embed(VOCABULARY, WIDTH)(v.embed, tokens), "batch", "length", "embed")

    def head(self, v):
        init = jax.nn.initializers.lecun_normal()
        return v.logits.param("kernel", (WIDTH, VOCABULARY), init, axes=("embed", "vocab")), None


OBJECTIVES = {
    "next_token": next_token(Bigram()),
    "supervised": sw.supervised(Bigram(), inputs="tokens", target="targets"),
}


def trained(objective, place=None):
    """The loss, the metrics and all gradients of a batch."""

    def run(params, batch):
        loss = lambda params: sw.apply(objective, params, {}, batch, train=True, place=place)[0]  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    return run


def largest_collective(text):
    """The elements of the largest array that a collective of a compiled program takes or gives, and its line."""
    found = [(0, "")]
    for line in text.splitlines():
        if re.search(rf" ({KINDS})(-start)?\(", line):
            line = line.split(", metadata=")[0].split(", replica_groups=")[0].split(", source_target")[0]
            shapes = re.findall(r"\w+\[([\d,]*)\]", line)
            found += [(math.prod(int(n) for n in shape.split(",") if n), line.strip()) for shape in shapes]
    return max(found)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_numbers_are_those_of_one_device_and_nothing_of_the_vocabulary_is_gathered(name):
    objective, mesh = OBJECTIVES[name], sw.mesh("fsdp=2,sequence=2,tensor=2")
    params, _ = sw.init(objective, 0, BATCH)
    expected = jax.block_until_ready(jax.jit(trained(objective))(params, BATCH))

    place = sw.parallel.placement(mesh, RULES)
    shardings = sw.parallel.param_shardings(sw.spec(objective, BATCH).params, mesh, RULES)
    assert tuple(shardings["embed"]["table"].spec) == ("tensor", "fsdp")
    assert tuple(shardings["logits"]["kernel"].spec) == ("fsdp", "tensor")
    spread = jax.device_put(params, shardings)
    batch = sw.parallel.put_batch(BATCH, sw.parallel.batch_sharding(mesh, RULES))
    out = (None, shardings)
    compiled = jax.jit(trained(objective, place), out_shardings=out).lower(spread, batch).compile()
    size, line = largest_collective(compiled.as_text())
    assert 0 < size < VOCABULARY * WIDTH, line  # a table; the logits of a device's 16 positions would be twice that
    (loss, metrics), gradients = jax.block_until_ready(compiled(spread, batch))
    ours, theirs = (loss, M.compute(metrics), gradients), (expected[0][0], M.compute(expected[0][1]), expected[1])
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_a_vocabulary_that_does_not_divide_is_left_whole_and_said():
    mesh = sw.mesh("data=2,tensor=4")
    model, tokens = L.Embed(6, 4), jnp.arange(6).reshape(2, 3)
    params, _ = sw.init(model, 0, tokens)
    with pytest.warns(
        sw.parallel.ShardingWarning, match=r"\('vocab', size 6\) does not divide by tensor=4: left whole"
    ):
        y, _ = sw.apply(model, params, {}, tokens, place=sw.parallel.placement(mesh, RULES))
    np.testing.assert_array_equal(y, params["table"][tokens])


ON_A_TPU = """
import json, re
import jax, jax.numpy as jnp, optax, sapwood as sw
from sapwood.models import Decoder
from sapwood.parallel.topologies import topology
from sapwood.train.state.plan import plan as plan_state
from sapwood.train.objectives.next_token import next_token

model = Decoder(32000, 2, 512, 4, mlp=1024)
mesh = sw.mesh("fsdp=4,sequence=2,tensor=2", devices=topology("v5e:4x4"))
objective = next_token(model) if NEXT else sw.supervised(model, inputs="tokens", target="targets")
trainer = sw.Trainer(objective, optax.sgd(0.1), mesh=mesh, policy="bfloat16")
batch = {x: jax.ShapeDtypeStruct((16, 512), "int32", sharding=trainer.batch_sharding) for x in ("tokens", "targets")}
plan = plan_state(trainer, batch)
print(json.dumps(trainer.compiled.train(plan.shardings).lower(plan.shapes, batch).compile().as_text()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.fresh_compile  # as it is for a TPU
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "sapwood[plan]"'
)
def test_on_a_tpu_nothing_of_the_vocabulary_is_gathered(name):
    """The largest thing sent is half of the table, or of the kernel: gathered over fsdp before its use."""
    code = ON_A_TPU.replace("NEXT", str(name == "next_token"))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    size, line = largest_collective(json.loads(done.stdout.splitlines()[-1]))
    assert size <= 32000 // 2 * 512, line  # the logits of a device's 4 x 256 positions are 32,768,000

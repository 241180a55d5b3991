"""A process killed with SIGKILL at any moment and started again ends bit for bit where an unbroken one ends."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.fresh_compile  # the bits of the programs that users run

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from sapwood.train import EarlyStopping, Trainer, supervised
from sapwood.saving.digest import digests, named_leaves

def model(v, x):
    mean = v.norm.state("mean", (8,), jax.nn.initializers.zeros)
    if v.train:
        v.norm.put(mean=0.9 * mean + 0.1 * x.mean(0))
        x = x * jax.random.bernoulli(v.drop.rng("mask"), 0.9, x.shape)
    return (x - mean) @ v.head.param("kernel", (8, 3), jax.nn.initializers.lecun_normal())

rng = np.random.default_rng(0)
data = {"x": rng.normal(size=(333, 8)).astype("float32"), "label": np.arange(333) % 3}
trainer = Trainer(supervised(model, inputs="x"), optax.adam(0.01), ema=0.99)
state, _ = trainer.fit(data, epochs=40, batch_size=8, validation=data, run=sys.argv[1], resume=True,
                       checkpoint_every=97, callbacks=[EarlyStopping(patience=100)], steps_per_call=eval(sys.argv[2]))
print("digest", sorted(digests(named_leaves(state)).items()))
"""


def start(directory, steps_per_call=1):
    command = [sys.executable, "-c", SCRIPT, str(directory), repr(steps_per_call)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an unbroken process prints."""
    printed = start(tmp_path_factory.mktemp("whole") / "run").communicate()[0].splitlines()[-1]
    assert printed.startswith("digest")
    return printed


def rows(directory):
    log = directory / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


# Of at least 40 that a run writes; it is killed wherever it has come to by the time that so many are seen.
DRAWN = [int(row) for row in np.random.default_rng(0).uniform(0, 40, 4)]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("after", [pytest.param(n, marks=pytest.mark.long if i else pytest.mark.slow)
                                   for i, n in enumerate(DRAWN)])  # fmt: skip
@pytest.mark.parametrize("steps_per_call", [1, 8, "auto"])
def test_killed_at_drawn_moments(tmp_path, whole, steps_per_call, after):
    process = start(tmp_path / "run", steps_per_call)
    while rows(tmp_path / "run") < after and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert start(tmp_path / "run", steps_per_call).communicate()[0].splitlines()[-1] == whole

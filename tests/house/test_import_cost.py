"""`import sapwood` is cheap, loads nothing heavy and changes nothing."""

import json
import os
import subprocess
import sys

import pytest

LIMIT = 0.15  # seconds over `import jax`
RUNS = 7
HEAVY = (
    *("flax", "optax", "orbax", "grain", "array_record", "tensorflow_datasets", "tensorflow", "keras"),
    *("rich", "treescope", "matplotlib", "PIL", "tyro", "tensorboard", "tensorboardX"),
    *("torch", "sklearn", "scipy.stats", "pandas", "pyarrow"),
)


def fresh(code: str):
    """What `code` prints as JSON in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_cost_over_jax():
    # One process, jax first: the noise of jax's own second of import stays outside the clock. CPU seconds, the least of
    # several runs: whatever else the machine does only ever adds.
    code = "import jax, time; t = time.process_time(); import sapwood; print(time.process_time() - t)"
    fresh(code)  # writes the bytecode
    seconds = [fresh(code) for _ in range(RUNS)]
    assert min(seconds) <= LIMIT, seconds


def test_loads_nothing_heavy():
    jax = set(fresh("import jax, sys, json; print(json.dumps(sorted(sys.modules)))"))
    both = set(fresh("import jax, sapwood, sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert {m for m in both - jax if any(m == h or m.startswith(h + ".") for h in HEAVY)} == set()
    rooms = {m.split(".")[1] for m in both if m.startswith("sapwood.")}
    assert not rooms & {"models", "data", "train", "interop", "recipes"}


WHOLE = "sapwood, sapwood.models, sapwood.data, sapwood.train, sapwood.interop, sapwood.recipes"


@pytest.mark.parametrize("what", ["sapwood", WHOLE])
def test_changes_no_global_setting(what):
    code = f"""
import json, logging, os, random, sys, warnings
import jax
def settings():
    return [
        {{k: repr(v) for k, v in jax.config.values.items()}}, dict(os.environ), repr(random.getstate())[:200],
        repr(logging.root.handlers), logging.root.level, repr(sys.excepthook), repr(sys.displayhook),
    ]
before = settings()
import {what}
print(json.dumps([before, settings()]))
"""
    before, after = fresh(code)
    assert before == after


def test_starts_no_backend():
    """Importing must leave the choice of devices (and `jax.distributed.initialize`) to the user."""
    code = """
import json, jax, sapwood
jax.config.update("jax_num_cpu_devices", 3)   # refused once a backend is up
print(len(jax.devices("cpu")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=_without_xla_flags()
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == 3


def _without_xla_flags() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}

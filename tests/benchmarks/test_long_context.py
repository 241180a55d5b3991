"""The benchmark of a long context: it runs, says what it took, and at full length keeps what it was made to show."""

import json
import subprocess
import sys

import pytest


def measured(root, tmp_path, *words):
    out = tmp_path / "numbers.json"
    command = [sys.executable, str(root / "benchmarks" / "long_context.py"), *words, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = json.loads(out.read_text())
    assert f"peak resident GiB: {numbers['peak resident GiB']}" in done.stdout
    return numbers


@pytest.mark.slow
def test_it_runs(root, tmp_path):
    numbers = measured(root, tmp_path, "--length", "256", "--devices", "4")
    assert (numbers["length"], numbers["devices"], numbers["way"]) == (256, 4, "ring")


@pytest.mark.long
@pytest.mark.fresh_compile
def test_131072_tokens_on_eight_devices(root, tmp_path):
    numbers = measured(root, tmp_path)
    assert numbers["length"] == 131_072
    assert numbers["peak resident GiB"] <= 4
    assert numbers["CPU seconds"] <= 1200

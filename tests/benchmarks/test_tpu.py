"""The training step, compiled for TPUs that are not here: what a chip holds, and that the kernels are in it.

Needs libtpu; where it is not installed the tests say so. The compiler takes minutes.
"""

import importlib.util
import json
import re
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.fresh_compile,  # as it is for a TPU
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "sapwood[plan]"'
    ),
]


def compiled(root, tmp_path, *words):
    """What `python benchmarks/tpu.py` finds, and the program it compiled."""
    out, hlo = tmp_path / "tpu.json", tmp_path / "program.hlo"
    command = [sys.executable, str(root / "benchmarks" / "tpu.py"), *words, "--out", str(out), "--hlo", str(hlo)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads(out.read_text()).values()
    return found, hlo.read_text()


@pytest.mark.parametrize("policy", [pytest.param("full", marks=pytest.mark.long), "minimal"])
def test_a_chip_holds_no_more_than_with_maxtext(root, tmp_path, policy):
    found, _ = compiled(root, tmp_path, "--policy", policy)
    assert found["parameters"] == 1_741_785_088
    assert found["chips"] == 16
    for kind in ("arguments", "temporaries"):
        assert round(found["bytes"][kind] / 2**30, 2) <= found["maxtext_gib"][kind], kind
    assert found["kernels"] >= 3  # forward, and the gradients of queries and of keys with values


def test_the_logits_of_attention_are_nowhere(root, tmp_path):
    """The model of the `gpt` suite, whose length of 256 no other array has twice."""
    words = ["depth=6", "width=384", "heads=6", "length=256", "batch_size=16", "vocabulary_size=8192"]
    found, program = compiled(root, tmp_path, "--size", "small", "--policy", "none", "--set", *words)
    assert found["kernels"] == 3
    assert not re.findall(r"\w+\[(?:\d+,)*256,256\]", program)


def test_the_default_recipe_compiles(root, tmp_path):
    found, _ = compiled(root, tmp_path, "--size", "small", "--policy", "none", "--mesh", "data=-1")
    assert found["kernels"] == 3
    assert "all-reduce" in found["collectives"]

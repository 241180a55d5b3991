"""Topologies: what is refused before libtpu is asked, and what it answers. Compiling is in tests/benchmarks."""

import importlib.util
import os
import subprocess
import sys

import pytest

import sapwood as sw
from sapwood.parallel.topology import ENVIRONMENT, topology


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sw.ConfigError, match=r'libtpu is not installed; pip install "sapwood\[plan\]"'):
        topology("v5e:4x4")


def test_it_wants_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    with pytest.raises(sw.ConfigError, match=r"a process of its own with TPU_SKIP_MDS_QUERY=1 in its environment"):
        topology("v5e:4x4")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "sapwood[plan]"'
)
@pytest.mark.parametrize(
    ("name", "answer"),
    [("v5e:4x4", "16 TPU v5 lite"), ("v5p:2x2x2", "8 TPU v5"), ("v5e:4y4", "topology 'v5e:4y4'"), ("v99:2x2", "v99")],
)
def test_what_libtpu_answers(name, answer):
    code = f"from sapwood.parallel import topology; d = topology({name!r}); print(len(d), d[0].device_kind)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert answer in (done.stdout or done.stderr.splitlines()[-1])
    assert done.stdout or "ConfigError" in done.stderr

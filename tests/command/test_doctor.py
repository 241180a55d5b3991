"""`sapwood doctor`: what is here, what is missing, and the command that mends it."""

import importlib.metadata
import os
import re
import sys
import tomllib

import jax
import pytest

import sapwood as sw
from sapwood.command import doctor


@pytest.fixture
def found(monkeypatch):
    """Nothing of this machine is seen but the CPU; JAX is free to choose."""
    jax.devices()  # has chosen, that is: libtpu, where it is installed, looks for a TPU and speaks on stderr
    monkeypatch.setattr(doctor, "nvidia", lambda: False)
    monkeypatch.setattr(doctor, "tpu", lambda: False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    asked = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield monkeypatch
    jax.config.update("jax_platforms", asked)


def test_versions_devices_and_data(sapwood, found, tmp_path):
    found.setenv("SAPWOOD_DATA_DIR", str(tmp_path / "data"))
    done = sapwood("doctor", "--mesh", "data=4,fsdp=2")
    assert (done.code, done.err, done.out[-1]) == (0, [], "all is well")
    lines = {line.split()[0]: line for line in done.out if line.strip()}
    assert lines["sapwood"].split()[1] == sw.__version__
    assert lines["jax"].split()[1] == jax.__version__
    assert re.fullmatch(r"devices     8 x cpu \(cpu\), process 0 of 1", lines["devices"])
    assert lines["mesh"] == "mesh        {'data': 4, 'fsdp': 2}"
    assert lines["data"] == f"data        {tmp_path}/data (nothing prepared yet)"
    assert not (tmp_path / "data").exists()


def test_prepared_data_is_named(sapwood, found, tmp_path):
    for path in ("digits/1.0.0", "mnist/3.0.1", "incomplete/x"):
        (tmp_path / "data" / path).mkdir(parents=True)
        if "incomplete" not in path:
            (tmp_path / "data" / path / "dataset_info.json").touch()
    found.setenv("SAPWOOD_DATA_DIR", str(tmp_path / "data"))
    assert f"data        {tmp_path}/data (digits, mnist)" in sapwood("doctor").out


def test_what_is_needed_is_looked_for(root):
    """Every dependency but the small ones."""
    with open(root / "pyproject.toml", "rb") as file:
        lines = tomllib.load(file)["project"]["dependencies"]
    needed = {re.split(r"[^\w-]", line)[0] for line in lines}
    assert needed - set(doctor.PACKAGES) <= {"importlib-resources", "requests", "tyro"}


def test_a_missing_package(sapwood, found):
    version = importlib.metadata.version

    def gone(name):
        if name == "grain":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    found.setattr(importlib.metadata, "version", gone)
    done = sapwood("doctor")
    assert done.code == 1
    assert "\n".join(done.out).endswith("missing     the package grain\n            pip install grain\n")
    assert "all is well" not in done.out


@pytest.mark.parametrize(
    ("kind", "what", "mend"),
    [
        ("nvidia", "JAX sees no GPU, but there is an NVIDIA driver", "pip install 'jax[cuda13]'"),
        ("tpu", "JAX sees no TPU, but this machine has one", "pip install 'jax[tpu]'"),
    ],
)
def test_an_accelerator_beside_a_jax_for_the_cpu(sapwood, found, kind, what, mend):
    found.setattr(doctor, kind, lambda: True)
    done = sapwood("doctor")
    assert done.code == 1
    assert f"missing     {what}\n            {mend}" in "\n".join(done.out)
    found.setenv("JAX_PLATFORMS", "cpu")  # as asked: nothing is missing
    assert sapwood("doctor").code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="a script is no program there")
def test_a_driver_is_known_by_its_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.Path, "exists", lambda self: False)
    assert not doctor.nvidia()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert doctor.nvidia()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a script is no program there")
def test_a_gpu_beside_a_jax_for_the_cpu_as_a_command(process, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done = process("doctor", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", JAX_PLATFORMS="")
    assert done.code == 1
    assert "missing     JAX sees no GPU, but there is an NVIDIA driver" in done.out
    assert "            pip install 'jax[cuda13]'" in done.out


@pytest.mark.slow
def test_a_platform_that_is_not_there(process):
    done = process("doctor", JAX_PLATFORMS="nonsense")
    assert (done.code, done.err) == (1, [])
    assert any(line.startswith("missing     JAX finds no device (JAX_PLATFORMS=nonsense)") for line in done.out)
    error = process("train", "digits-mlp", JAX_PLATFORMS="nonsense").error
    assert error.startswith("JAX finds no device; sapwood doctor says what is missing")


def test_a_directory_that_cannot_be_written(sapwood, found, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    found.setenv("SAPWOOD_DATA_DIR", "/data")
    done = sapwood("doctor")
    assert done.code == 1
    assert "missing     /data cannot be written" in done.out
    assert "            export SAPWOOD_DATA_DIR=/a/directory/that/can" in done.out

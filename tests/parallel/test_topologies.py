"""Topologies: what is refused before libtpu is asked, and what it answers. Compiling is in tests/benchmarks."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from stand_in_chips import CHIPS, chips

import sapwood as sw
from sapwood.parallel.topologies import ENVIRONMENT, KINDS, SHAPES, shape_of, topology


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


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v5litepod-16", "v5e:4x4"),  # chips
        ("v5litepod-1", "v5e:1x1"),
        ("v5e-8", "v5e:2x4"),
        ("v6e-64", "v6e:8x8"),
        ("v5p-128", "v5p:4x4x4"),  # TensorCores, two a chip
        ("v5p-8", "v5p:2x2x1"),
        ("v4-32", "v4:2x2x4"),
        ("tpu7x-16", "tpu7x:2x2x2"),
        ("v3-32", "v3:4x4"),
        (" v5p:2x2x4 ", "v5p:2x2x4"),  # as libtpu calls it
        ("v4:4x4x8_twisted", "v4:4x4x8_twisted"),
    ],
)
def test_what_the_cloud_calls_a_topology(name, shape):
    assert shape_of(name) == shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "v5litepod-20",
            r"20 chips have no shape of their own, as 1, 4, 8, .*, 256 have; name a shape, such as v5e:4x4",
        ),
        ("v5p-4", r"4 TensorCores \(two a chip\) have no shape of their own, as 8, 16, .*; name a shape, .* v5p:2x2x4"),
        ("v5p-9", r"9 TensorCores"),
        ("h200-8", r"no accelerator type is called 'h200'; there are v2, v3, v4, v5litepod"),
        (16, r"a name such as .* is expected, got 16"),
    ],
)
def test_an_accelerator_type_that_is_none(name, message):
    with pytest.raises(sw.ConfigError, match=message):
        topology(name)


@pytest.mark.parametrize("slices", [0, -1, 2.0, True, "2"])
def test_a_number_of_slices_that_is_none(slices):
    with pytest.raises(sw.ConfigError, match=r"slices=.*a whole number, at least 1, is expected"):
        topology("v5e:4x4", slices)


ASK = """
import json, sys
import sapwood as sw
for name, slices in json.loads(sys.argv[1]):
    try:
        found = [[d.id, d.device_kind, list(d.coords), d.core_on_chip, getattr(d, "slice_index", None)]
                 for d in sw.parallel.topology(name, slices)]
    except sw.ConfigError as error:
        found = str(error)
    print(json.dumps(found))
"""


def asked(*questions):
    """What `topology` gives for each name and number of slices in a process with libtpu: devices, or the error."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(questions)],
        env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("[", '"'))]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "sapwood[plan]"'
)
def test_what_libtpu_answers():
    cloud = [(f"{name}-{chips * each}", chips) for name, (kind, each) in KINDS.items() for chips in SHAPES[kind]]
    layouts = [(name, slices) for name in CHIPS for slices in (1, 2, 4)]
    found = asked(*layouts, *((name, 1) for name, _ in cloud), ("v5e:4y4", 1), ("v99:2x2", 1), ("v5litepod-16", 3))
    for (name, slices), devices in zip(layouts, found, strict=False):  # the stand-ins of the tests of meshes
        expected = [[d.device_kind, list(d.coords), d.core_on_chip, d.slice_index] for d in chips(name, slices)]
        assert sorted(d[1:] for d in devices) == sorted(expected)
    *types, no_shape, no_kind, three = found[len(layouts) :]
    for (name, count), devices in zip(cloud, types, strict=True):
        assert len({tuple(d[2]) for d in devices}) == count, name
    assert no_shape.startswith("topology 'v5e:4y4'")
    assert "v99" in no_kind
    assert no_kind.endswith("or an accelerator type such as v5litepod-16")
    assert [d[4] for d in three] == [0] * 16 + [1] * 16 + [2] * 16

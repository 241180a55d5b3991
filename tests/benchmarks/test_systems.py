"""Every system does the floor's work: on small versions of the suites, its first losses are the floor's."""

import dataclasses
import functools

import numpy as np
import pytest

from benchmarks.race import installed
from benchmarks.suite import OURS, PEERS, suites
from benchmarks.systems import build
from benchmarks.work import Work, prepare

SMALL = {
    "mlp": {},
    "conv": {"stages": (4, 8), "blocks": 1},
    "gpt": {"layers": 1, "width": 16, "heads": 2, "tokens": 8, "vocabulary": 32},
}
STEPS = 3
PEERS_IN_CI = {("linen", "conv"), ("nnx", "gpt"), ("keras", "mlp")}
"""Each of the peers that CI installs, with one model."""


def marks(system, name):
    if system in OURS:
        return () if name == "mlp" else pytest.mark.slow
    return pytest.mark.slow if (system, name) in PEERS_IN_CI else pytest.mark.long


def cells():
    systems = (*OURS, *(peer for peer in PEERS if peer != "torch-compile"))
    return [
        pytest.param(name, system, marks=marks(system, name), id=f"{system}-{name}")
        for system in systems
        for name in SMALL
    ]


@functools.cache
def small(name):
    suite = suites(name)[0]
    return dataclasses.replace(suite, config={**suite.config, **SMALL[name]}, epoch=STEPS)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The directory of a small suite, its files written and the floor's losses known."""

    @functools.cache
    def of(name):
        directory = tmp_path_factory.mktemp(name)
        prepare(small(name), directory)
        return directory, build(Work(small(name), "floor", directory)).losses(STEPS)

    return of


@pytest.mark.parametrize(("name", "system"), cells())
def test_first_losses_are_the_floors(name, system, prepared):
    if not installed(system):
        pytest.skip(f"{system} is not installed")
    if system == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(1)  # its threads wait by spinning, which tests that run side by side pay for
    directory, floor = prepared(name)
    found = build(Work(small(name), system, directory)).losses(STEPS)
    np.testing.assert_allclose(found, floor, rtol=small(name).tolerance)
    assert len(set(floor)) == STEPS

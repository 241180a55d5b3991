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
    "gpt": {"layers": 2, "width": 16, "heads": 2, "tokens": 8, "vocabulary": 32},
}


@functools.cache
def small(name):
    suite = suites(name)[0]
    return dataclasses.replace(suite, config={**suite.config, **SMALL[name]}, epoch=4)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The directory of a small suite, its files written and the floor's losses known."""

    @functools.cache
    def of(name):
        directory = tmp_path_factory.mktemp(name)
        prepare(small(name), directory)
        return directory, build(Work(small(name), "floor", directory)).losses(4)

    return of


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "system", [*OURS, *(pytest.param(peer, marks=pytest.mark.slow) for peer in PEERS if peer != "torch-compile")]
)
def test_first_losses_are_the_floors(name, system, prepared):
    if not installed(system):
        pytest.skip(f"{system} is not installed")
    if system == "torch":
        torch = pytest.importorskip("torch")
        torch.set_num_threads(1)  # its threads wait by spinning, which tests that run side by side pay for
    directory, floor = prepared(name)
    found = build(Work(small(name), system, directory)).losses(4)
    np.testing.assert_allclose(found, floor, rtol=small(name).tolerance)
    assert len(set(floor)) == 4

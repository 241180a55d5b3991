"""Every metric through `evaluate` against scikit-learn's, as benchmarks/metrics.py measures it."""

import json

import pytest

from benchmarks import metrics

QUICK = ["blobs, classes 1, 4, 6, 8 of 12", "seven labels, one absent", "20000 plus minus 1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_some_data_sets(name):
    """Under weights, of which some are 0, in batches that leave a remainder."""
    assert max(metrics.differences(metrics.cases()[name], True, [11]).values()) < metrics.BOUND


@pytest.mark.long
def test_the_whole_table():
    """Ten minutes, alone on two cores."""
    for name in metrics.cases():
        row = metrics.measure(name)
        assert row["largest difference"] < metrics.BOUND, (name, row)


@pytest.mark.slow
def test_the_committed_table_is_whole_and_within_the_bound():
    rows = json.loads(metrics.RESULTS.read_text())["data sets"]
    cases = metrics.cases()
    assert list(rows) == list(cases)
    for name, row in rows.items():
        assert row["outputs"] == list(cases[name].outputs.shape)
        assert row["batch sizes"] == metrics.sizes_of(len(cases[name].target))
        assert row["largest difference"] < metrics.BOUND

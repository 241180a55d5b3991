"""`sapwood evaluate` on what no training gave: how the metrics are printed."""

from types import SimpleNamespace

import numpy as np

from sapwood.experiment.experiment import Experiment


def test_a_metric_that_is_no_single_number(sapwood, monkeypatch):
    scores = {"loss": 0.25, "examples": 3, "confusion": np.array([[2.0, 0.0], [1.0, 4.0]])}
    run = SimpleNamespace(restore=lambda step: None, test=lambda state: scores)
    monkeypatch.setattr(Experiment, "open", lambda *_: run)
    done = sapwood("evaluate", "r")
    assert (done.code, done.err) == (0, [])
    assert done.out == ["test loss 0.2500", "test examples 3.0000", "test confusion [[2.0, 0.0], [1.0, 4.0]]"]

"""Metrics through `fit`: accumulated in micro-batches, sent in blocks of steps, and over eight devices."""

import numpy as np
import optax
import pytest
import sklearn.metrics as oracle

import sapwood as sw

RNG = np.random.default_rng(0)
N = 48
FAR = (20000 + RNG.normal(size=N)).astype("float32")
BITS = RNG.integers(0, 2, N).astype("int32")
SCORE = (RNG.normal(size=N) * 2 + BITS + 12).astype("float32")


def handed_on(v, outputs):
    return outputs + v.param("zero", (), lambda key, shape, dtype: np.zeros(shape, dtype))


def numbers(s):
    true, outputs = FAR[s].astype(float), (FAR + np.float32(0.5))[s].astype(float)
    return {"r2": oracle.r2_score(true, outputs), "root_mean_squared_error": 0.5}


def bits(s):
    return {"auc": oracle.roc_auc_score(BITS[s], SCORE[s]), "binary_f1": oracle.f1_score(BITS[s], SCORE[s] > 0)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "outputs", "target", "expected", "mesh"),
    [("squared_error", FAR + np.float32(0.5), FAR, numbers, None), ("focal", SCORE, BITS, bits, "data=8")],
    ids=["numbers", "bits on a mesh"],
)
def test_rows_of_fit_are_of_the_whole_epoch(loss, outputs, target, expected, mesh):
    """A learning rate of 0 changes nothing, so the row of an epoch and its validation are those of the whole set."""
    whole, some = slice(None), slice(N - 5)
    objective = sw.supervised(handed_on, loss, tuple(expected(whole)), inputs="outputs", target="y")
    trainer = sw.Trainer(objective, optax.sgd(0.0), mesh=mesh, accumulate=3)
    data, rest = ({"outputs": outputs[s], "y": target[s]} for s in (whole, some))
    row = trainer.fit(data, epochs=1, batch_size=24, validation=rest, steps_per_call=2, progress=False).history[-1]
    for name, value in expected(whole).items():
        assert row[name] == pytest.approx(value, rel=1e-4)
        assert row[f"validation_{name}"] == pytest.approx(expected(some)[name], rel=1e-4)

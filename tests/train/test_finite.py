"""No state is saved that a run cannot go on from: what is looked at, and that good checkpoints stay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapwood import CheckError, parallel
from sapwood.saving.checkpoints import Checkpoints
from sapwood.train import Trainer, supervised
from sapwood.train.state import finite
from sapwood.train.state.finite import not_finite
from sapwood.train.state.train_state import TrainState

DATA = {"x": np.eye(4, dtype="float32"), "label": np.arange(4)}
OBJECTIVE = supervised(lambda v, x: x @ v.param("w", (4, 4), jax.nn.initializers.zeros), inputs="x")
FIT = {"steps": 8, "batch_size": 2, "checkpoint_every": 2, "progress": False, "steps_per_call": 1}


def blows_up(step):
    """An optimizer whose update after so many steps is infinite, of finite gradients: no check of a step sees that."""
    return optax.sgd(lambda count: jnp.where(count < step, 0.1, jnp.inf))


def numpy_says(state):
    """The same question of every number, one by one."""
    bad = []
    for name in ("params", "ema", "state", "ema_state", "opt_state"):
        for path, x in jax.tree_util.tree_flatten_with_path(getattr(state, name))[0]:
            key = "/".join([name, jax.tree_util.keystr(path, simple=True, separator="/")])
            numbers = np.ravel(np.asarray(x, np.complex128)) if jnp.issubdtype(x.dtype, jnp.inexact) else []
            strict = name in ("params", "ema")
            if any(np.isnan(n) or (strict and np.isinf(n)) for n in numbers):
                bad.append(key)
    return bad


@pytest.mark.parametrize("where", ["one device", "sharded", "in a program"])
def test_each_array_is_looked_at(monkeypatch, where):
    """On the host, whole or in pieces, and in a program over sharded arrays."""
    place = None if where == "one device" else parallel.batch_sharding(parallel.mesh("data=8"))
    if where == "in a program":
        monkeypatch.setattr(finite.jax, "default_backend", lambda: "tpu")
        monkeypatch.setattr(finite, "HOST_ELEMENTS", 0)
    rng = np.random.default_rng(0)
    trees = []
    for odd in (0.0, np.nan, np.inf, -np.inf):
        for dtype in ("float32", "bfloat16", "float16", "complex64", "int32"):
            x = rng.normal(size=(8, 3)).astype(jnp.dtype(dtype))
            if dtype != "int32":
                x[5, 2] = odd
            trees.append(jnp.asarray(x) if place is None else jax.device_put(x, place))
    key = jax.random.key(0)
    parts = [{str(i): x for i, x in enumerate(trees)} for _ in range(5)]
    state = TrainState(0, parts[0], parts[1], (parts[2], key), key, parts[3], parts[4])
    found = not_finite(state)
    assert sorted(found) == sorted(numpy_says(state.replace(opt_state=(parts[2],))))
    assert len(found) == 2 * 12 + 3 * 4
    assert not_finite(TrainState(0, {}, {}, (), key)) == []


def test_good_checkpoints_stay_and_a_resume_goes_on(tmp_path):
    trainer = Trainer(OBJECTIVE, blows_up(5))
    for resume in (False, True):
        with pytest.raises(CheckError, match=r"after step 6 'params/w' is not finite: .* checkpoint 4 is the newest"):
            trainer.fit(DATA, run=tmp_path, resume=resume, **FIT)
        assert Checkpoints(tmp_path / "checkpoints").steps() == [2, 4]
    state, _ = Trainer(OBJECTIVE, optax.sgd(optax.constant_schedule(0.1))).fit(
        DATA, run=tmp_path, resume="anyway", **FIT
    )
    assert np.isfinite(state.params["w"]).all()


@pytest.mark.slow
def test_the_first_one_says_that_there_is_none(tmp_path):
    with pytest.raises(CheckError, match=r"after step 2 .* there is no checkpoint"):
        Trainer(OBJECTIVE, blows_up(1)).fit(DATA, run=tmp_path, **FIT)


@pytest.mark.slow
def test_who_asks_gets_it_saved(tmp_path):
    trainer = Trainer(OBJECTIVE, blows_up(5), checks=False)
    trainer.fit(DATA, run=tmp_path, save_nonfinite=True, **FIT)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 6, 8]

"""The moves of the loss scale; what a skipped step leaves alone is tested with the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sapwood import CheckError, ConfigError
from sapwood.train import Trainer, supervised
from sapwood.train.step.loss_scale import LossScale, all_finite, skips


def test_it_doubles_after_the_interval_and_halves_on_overflow():
    scaling = LossScale(initial=4, interval=3)
    state, update = scaling.init(), jax.jit(scaling.update)
    seen = []
    for finite in [True, True, True, True, False, True, True, True]:
        state = update(state, jnp.bool_(finite))
        seen.append((float(state.scale), int(state.good), int(state.skipped)))
    assert seen == [(4, 1, 0), (4, 2, 0), (8, 0, 0), (8, 1, 0), (4, 0, 1), (4, 1, 1), (4, 2, 1), (8, 0, 1)]


def test_it_never_leaves_one_to_the_largest_finite_scale():
    scaling = LossScale(initial=1, interval=1)
    state = scaling.init()
    assert float(scaling.update(state, jnp.bool_(False)).scale) == 1
    for _ in range(200):
        state = scaling.update(state, jnp.bool_(True))
    assert bool(jnp.isfinite(state.scale))


def test_all_finite_looks_at_every_leaf():
    good = {"a": jnp.ones(3), "b": {"c": jnp.ones(())}}
    assert bool(all_finite(good))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not bool(all_finite({**good, "b": {"c": jnp.float16(bad)}}))


def test_skips_in_a_row_are_counted_across_rows():
    rng = np.random.default_rng(0)
    for _ in range(100):
        steps = rng.random(40) < 0.7
        cut = rng.integers(0, 41)
        runs = ["".join("x" if s else " " for s in part) for part in (steps, steps[:cut])]
        now, most = skips(0, steps[:cut])
        now, later = skips(now, steps[cut:])
        assert now == len(runs[0]) - len(runs[0].rstrip("x"))
        assert max(most, later) == max(map(len, runs[0].split()), default=0)


OVERFLOWS = {"x": np.full((8, 4), 6e4, "float32"), "label": np.arange(8) % 2}


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (4, {}, "all 4 steps of the run were skipped, so nothing was learned: .* at a loss scale of 2048;"),
        pytest.param(
            60,
            {"checks": False},
            r"50 steps in a row were skipped by step 52 \(LossScale\(patience=50\)\)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_whose_steps_are_skipped_ends_with_an_error(steps, options, message):
    def model(v, x):
        return x * v.param("w", (4,), jax.nn.initializers.ones) * 100

    trainer = Trainer(supervised(model, inputs="x"), optax.sgd(0.1), policy="float16", **options)
    with pytest.raises(CheckError, match=message):
        trainer.fit(OVERFLOWS, steps=steps, batch_size=2, log_every=4, progress=False, steps_per_call=1)


@pytest.mark.parametrize("options", [{"initial": 0.5}, {"interval": 0}, {"factor": 1.0}, {"patience": 0}])
def test_values_that_cannot_be(options):
    with pytest.raises(ConfigError, match="at least 1"):
        LossScale(**options)


def test_it_moves_under_strict_dtypes_too():
    with jax.numpy_dtype_promotion("strict"):
        state = LossScale().update(LossScale().init(), jnp.bool_(False))
    assert (int(state.skipped), state.skipped.dtype) == (1, jnp.int32)

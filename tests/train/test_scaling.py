"""The moves of the loss scale; what a skipped step leaves alone is tested with the step."""

import jax
import jax.numpy as jnp
import pytest

from sapwood import ConfigError
from sapwood.train.scaling import LossScale, all_finite


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


@pytest.mark.parametrize("options", [{"initial": 0.5}, {"interval": 0}, {"factor": 1.0}])
def test_values_that_cannot_be(options):
    with pytest.raises(ConfigError, match="at least 1"):
        LossScale(**options)

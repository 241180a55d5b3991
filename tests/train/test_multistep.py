"""Several steps in one dispatch: the same bits, rows and errors as one at a time, and used only where that holds."""

import jax
import numpy as np
import optax
import pytest

from sapwood import ConfigError
from sapwood import layers as L
from sapwood.train import Trainer, multistep, supervised
from sapwood.train.digest import tree_digest
from sapwood.train.schedule import Schedule

RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(90, 6)).astype("float32"), "label": (np.arange(90) % 3).astype("int32")}


def mlp(v, x):
    return L.Dense(3)(v.head, jax.nn.relu(L.Dense(16)(v.hidden, x)))


def fit(trainer, steps_per_call, data=DATA, **options):
    return trainer.fit(
        data,
        **{"steps": 40, "batch_size": 4, "log_every": 9, "progress": False, **options},
        steps_per_call=steps_per_call,
    )


def lasting(rows):
    """The rows without what depends on the clock."""
    return [{name: x for name, x in row.items() if name != "steps_per_second"} for row in rows]


@pytest.mark.parametrize("block", [3, 8])
def test_blocks_give_the_bits_and_rows_of_single_steps(block):
    trainer = Trainer(supervised(mlp, inputs="x"), optax.adam(0.01))
    one, several = fit(trainer, 1), fit(trainer, block)
    assert tree_digest(several.state) == tree_digest(one.state)
    assert lasting(several.history) == lasting(one.history)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "fast", True, None])
def test_options_that_cannot_be(wrong):
    trainer = Trainer(supervised(mlp, inputs="x"), optax.adam(0.01))
    with pytest.raises(ConfigError, match=r'a whole number, at least 1 .* or "auto"'):
        fit(trainer, wrong)


def test_a_row_ends_where_the_schedule_closes_it():
    for plan in (Schedule(50, 7, 3, 11), Schedule(20, 20, 100, 6), Schedule(9, 100, 4, 100)):
        for step in range(plan.steps):
            assert plan.row_end(step) == next(s for s in range(step + 1, 99) if plan.closes_row(s))


def test_no_block_crosses_a_point_where_something_happens():
    plan, done, sizes = Schedule(50, 17, 6, 20), 0, []
    while size := multistep.size(plan, 4, done):
        assert not any(plan.closes_row(step) for step in range(done + 1, done + size))
        done, sizes = done + size, [*sizes, size]
    assert done == 50
    assert set(sizes) == {1, 4}

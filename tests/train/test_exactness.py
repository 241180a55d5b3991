"""What an objective of one's own counts: exact in batches of any size, on a mesh and over micro-batches, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import ConfigError
from sapwood.train import Mean, Metric, Trainer

RANDOM = np.random.default_rng(3)
X, Y = RANDOM.normal(size=(11, 5, 4)).astype("float32"), RANDOM.normal(size=(11, 5)).astype("float32")
TOKENS = RANDOM.integers(1, 6, 11)
# To an objective of one's own, entries of these names are entries like any other.
DATA = {"x": X, "y": Y, "tokens": TOKENS, "weight": TOKENS.astype("float32") ** 2, "mask": (TOKENS > 2).astype("int32")}
KERNEL = np.float32([[1.0], [-2.0], [0.5], [3.0]])


def errors(v, batch):
    """One for each position (batch, length)."""
    kernel = v.param("kernel", (4, 1), lambda key, shape, dtype: jnp.asarray(KERNEL, dtype))
    return jnp.square((batch["x"] @ kernel)[..., 0] - batch["y"])


def of_examples(v, batch):
    return Mean.of(errors(v, batch)), {"largest": Mean.of(errors(v, batch).max(-1))}


def of_tokens(v, batch):
    return Mean.of(errors(v, batch), jnp.arange(5) < batch["tokens"][:, None]), {}


def of_weights(v, batch):
    return Mean.of(errors(v, batch), batch["weight"]), {"mask": Mean.of(batch["mask"])}


def number(v, batch):
    return errors(v, batch).mean(), {}


def ratio(v, batch):
    counted = jnp.arange(5) < batch["tokens"][:, None]
    return (errors(v, batch) * counted).sum() / counted.sum(), {}


def number_beside(v, batch):
    return of_examples(v, batch)[0], {"scalar": jnp.mean(batch["y"])}


def expected():
    """The metrics of each objective, in float64."""
    each = ((X.astype("float64") @ KERNEL)[..., 0] - Y) ** 2
    counted = np.arange(5) < TOKENS[:, None]
    return {
        of_examples: {"loss": each.mean(), "largest": each.max(1).mean()},
        of_tokens: {"loss": each[counted].mean()},
        of_weights: {"loss": np.average(each.mean(1), weights=TOKENS**2.0), "mask": np.mean(TOKENS > 2)},
    }


def trainer(objective, **options):
    return Trainer(objective, optax.sgd(0.01), **options)


def first(one, rows=8):
    return one.init(0, {name: x[:rows] for name, x in DATA.items()})


@pytest.mark.parametrize("objective", [of_examples, of_tokens, of_weights], ids=lambda o: o.__name__)
def test_any_batch_size_gives_the_metrics_of_the_whole_set(objective):
    one = trainer(objective)
    state = first(one)
    for size in (None, 4, 16):  # all at once; 4, 4 and 3; 11 of 16
        assert one.evaluate(state, DATA, size) == pytest.approx(expected()[objective], rel=1e-5), size


def test_on_a_mesh_too_that_does_not_divide_what_is_left():
    one = trainer(of_tokens, mesh=sw.mesh("data=4,tensor=2", devices=jax.devices()))
    assert one.evaluate(first(one), DATA, 8) == pytest.approx(expected()[of_tokens], rel=1e-5)


@pytest.mark.parametrize("objective", [of_tokens, of_weights], ids=lambda o: o.__name__)
def test_micro_batches_are_the_whole_batch_however_their_tokens_fall(objective):
    batch = {name: x[:8] for name, x in DATA.items()}
    state = first(trainer(objective))
    one, four = (jax.jit(trainer(objective, accumulate=n).step)(state, batch) for n in (1, 4))
    np.testing.assert_allclose(one[0].params["kernel"], four[0].params["kernel"], rtol=1e-5)
    for name, metric in one[1].items():
        np.testing.assert_allclose(four[1][name].compute(), metric.compute(), rtol=1e-5)


@pytest.mark.parametrize("objective", [number, ratio, number_beside], ids=lambda o: o.__name__)
def test_what_does_not_say_how_much_it_counts_is_not_put_together(objective):
    """The loss of one batch it is, in training and in evaluation. Several raise, before the first epoch."""
    one = trainer(objective)
    state, batch = first(one), {name: x[:8] for name, x in DATA.items()}
    whole = objective(sw.bind({"kernel": KERNEL}, {}), DATA)[0]
    alone = one.evaluate(state, DATA)["loss"]
    np.testing.assert_allclose(alone, whole.compute() if isinstance(whole, Mean) else whole, rtol=1e-5)
    what = "the metric 'scalar'" if objective is number_beside else "its loss"
    says = f"the objective {objective.__name__} gives {what} as a plain number.* Mean.of"
    with pytest.raises(ConfigError, match=f"evaluating 11 examples in batches of 4 .*batch_size=11.*{says}"):
        one.evaluate(state, DATA, 4)
    with pytest.raises(ConfigError, match=rf"accumulate=4\) adds micro-batches up, but {says}"):
        jax.eval_shape(trainer(objective, accumulate=4).step, state, batch)


class Above(Metric):
    """How many outputs lie above their target, of how many."""

    above: jax.Array
    count: jax.Array

    def compute(self):
        return self.above / self.count


def test_metrics_of_ones_own_that_look_at_no_weight_count_each_example_once():
    def line(v, x):
        return (x @ v.param("kernel", (4, 1), lambda key, shape, dtype: jnp.asarray(KERNEL, dtype)))[..., 0]

    chosen = {
        "values": lambda outputs, target, weight: outputs > target,
        "mean": lambda outputs, target, weight: Mean.of(outputs > target),
        "sums": lambda outputs, target, weight: Above((outputs > target).sum(), jnp.float32(target.size)),
    }
    one = trainer(sw.supervised(line, "squared_error", chosen, inputs="x", target="y"))
    data = {"x": X, "y": Y}
    state = one.init(0, {name: x[:8] for name, x in data.items()})
    above = ((X.astype("float64") @ KERNEL)[..., 0] > Y).mean()
    for size in (None, 4):
        found = one.evaluate(state, data, size)
        assert found.pop("loss") == pytest.approx(expected()[of_examples]["loss"], rel=1e-5)
        assert found == pytest.approx(dict.fromkeys(chosen, above), rel=1e-6), size
    # An entry "weight" of the data is another matter: those that look at it count by it, the others do not.
    found = one.evaluate(state, {**data, "weight": TOKENS.astype("float32")}, 4)
    weighed = np.average(((X.astype("float64") @ KERNEL)[..., 0] > Y).mean(1), weights=TOKENS)
    loss = np.average((((X.astype("float64") @ KERNEL)[..., 0] - Y) ** 2).mean(1), weights=TOKENS)
    assert found == pytest.approx({"values": weighed, "mean": above, "sums": above, "loss": loss}, rel=1e-5)


def test_a_mean_of_a_mean_is_refused_unless_it_says_what_it_counts():
    def batch_mean(v, batch):
        return Mean.of(errors(v, batch).mean()), {}

    def counted(v, batch):
        return Mean.of(errors(v, batch).mean(), errors(v, batch).size), {}

    with pytest.raises(ConfigError, match=r"a value for each example.* got one number.*before their mean"):
        first(trainer(batch_mean))
    one = trainer(counted)
    assert one.evaluate(first(one), DATA, 4)["loss"] == pytest.approx(expected()[of_examples]["loss"], rel=1e-5)


def test_validation_that_cannot_be_put_together_is_refused_before_the_first_epoch():
    seen = []
    many = {name: np.concatenate([x] * 24) for name, x in DATA.items()}  # 264: more than a batch
    with pytest.raises(ConfigError, match="evaluating 264 examples in batches of 256"):
        trainer(number).fit(
            DATA, epochs=1, batch_size=11, validation=many, progress=False, callbacks=[lambda *_: seen.append(1)]
        )
    assert not seen


def test_an_objective_that_takes_masks_is_evaluated_by_one_program():
    shapes = set()

    def objective(v, batch):
        shapes.add(batch["x"].shape)
        mean = Mean.of(errors(v, batch), batch.get("mask"))
        return mean, {"mean": mean.total / mean.weight}  # by its promise of what the mask leaves

    objective.takes_mask = True
    one, data = trainer(objective), {name: DATA[name] for name in ("x", "y")}
    found = one.evaluate(one.init(0, {name: x[:4] for name, x in data.items()}), data, 4)
    assert found == pytest.approx(dict.fromkeys(("loss", "mean"), expected()[of_examples]["loss"]), rel=1e-5)
    assert shapes == {(4, 5, 4)}

"""The pure step against the same computation written by hand in plain JAX and optax."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import ConfigError, losses
from sapwood.metrics import Mean, compute
from sapwood.train import LossScale, Trainer, TrainState, supervised
from sapwood.train.optimizers.learning_rate import rate_metrics
from sapwood.train.state import plan
from sapwood.train.step import checks
from sapwood.train.step.accumulate import accumulate
from sapwood.train.step.forward import Pass
from sapwood.train.step.loss_scale import all_finite

zeros = jax.nn.initializers.zeros


def normal(key, shape, dtype):
    """Spread-out values that compile in no time."""
    return jnp.sin(3.0 * jnp.arange(np.prod(shape))).reshape(shape).astype(dtype)


RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 4)).astype("float32")
BATCH = {"x": X, "label": RNG.integers(0, 3, 12).astype("int32")}
# One value for each, so that trainers of several tests are the same one, and what it compiles is kept.
ADAM, SGD, SLOW_SGD = optax.adam(0.1), optax.sgd(1.0), optax.sgd(0.1)


def mlp(v, x):
    x = jnp.tanh(x @ v.hidden.param("kernel", (x.shape[-1], 8), normal) + v.hidden.param("bias", (8,), zeros))
    return x @ v.head.param("kernel", (8, 3), normal)


def counting(v, x):
    """A model with a running mean, so that there is a state to watch."""
    mean = v.norm.state("mean", (x.shape[-1],), zeros)
    if v.train:
        v.norm.put(mean=0.9 * mean + 0.1 * x.mean(0))
    return mlp(v, x)


def by_hand(params, x, label):
    h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return optax.softmax_cross_entropy_with_integer_labels(h @ params["head"]["kernel"], label).mean()


@functools.cache
def make(model=mlp, optimizer=ADAM, metrics=(), **options):
    return Trainer(supervised(model, metrics=metrics, inputs="x"), optimizer, **options)


@functools.cache
def step_of(trainer):
    return jax.jit(trainer.step)


@jax.jit
def gradient_by_hand(params, batch):
    """The loss and its gradient."""
    return jax.value_and_grad(by_hand)(params, batch["x"], batch["label"])


def run(trainer, batches, state=None):
    state = trainer.init(0, batches[0]) if state is None else state
    for batch in batches:
        state, metrics = step_of(trainer)(state, batch)
    return state, metrics


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(jax.random.key_data(x) if jnp.issubdtype(
        x.dtype, jax.dtypes.prng_key) else x, jax.random.key_data(y) if jnp.issubdtype(
        y.dtype, jax.dtypes.prng_key) else y), a, b)  # fmt: skip


def test_three_steps_by_hand():
    trainer, tx = make(), optax.adam(0.1)
    state = trainer.init(0, BATCH)

    @jax.jit
    def three(params):
        opt_state = tx.init(params)
        for _ in range(3):
            loss, grads = gradient_by_hand(params, BATCH)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, loss

    params, loss = three(state.params)
    after, metrics = run(trainer, [BATCH] * 3, state)
    assert_trees_close(after.params, params)
    assert int(after.step) == 3
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)


@pytest.mark.parametrize(
    "given", [({"x": np.ones((2, 2))}, "a Dataset; data.gather"), (None, "a list"), ({}, "an empty")]
)
def test_what_is_no_batch_is_an_error_that_says_what_is(given):
    """A whole data set above all, which `fit` takes."""
    data, says = given
    what = [1, 2] if data is None else data and sw.data.load(data)
    one = make()
    for call in (one.init, one.step):
        with pytest.raises(ConfigError, match=f"a batch is a dict of arrays .* got {says}"):
            call(TrainState(0, {}, {}, (), None), what)


def test_the_parameters_are_those_of_init():
    def model(v, x):
        return jnp.tanh(x @ v.a.param("w", (4, 8), glorot)) @ v.b.param("w", (8, 3), jax.nn.initializers.normal(0.5))

    glorot = jax.nn.initializers.glorot_uniform()
    trainer = make(model)
    params, _ = sw.init(trainer.objective, 7, BATCH)
    assert_trees_equal(trainer.init(7, BATCH).params, params)


def shapes(trainer):
    """The state before the first step, undrawn."""
    return jax.eval_shape(lambda: trainer.init(0, BATCH))


def ops(lowered):
    return Counter(re.findall(r"= \"?stablehlo\.(\w+)", lowered.as_text()))


def test_the_lean_step_lowers_to_what_is_written_by_hand():
    tx, trainer = ADAM, make(checks=False)
    state = shapes(trainer)

    def step(params, opt_state, count, batch):
        loss, grads = jax.value_and_grad(by_hand)(params, batch["x"], batch["label"])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, count + 1, loss

    plain = jax.jit(step).lower(state.params, state.opt_state, state.step, BATCH)
    assert ops(jax.jit(trainer.step).lower(state, BATCH)) == ops(plain)


def test_what_checks_add_is_a_few_comparisons_and_one_choice_a_parameter():
    lean, checked = make(checks=False), make()
    extra = ops(jax.jit(checked.step).lower(shapes(checked), BATCH))
    extra -= ops(jax.jit(lean.step).lower(shapes(lean), BATCH))
    kinds = {(x.shape, x.dtype) for x in jax.tree.leaves(shapes(lean).params)}
    kinds_of = {
        "select",
        "compare",
        "and",
        "or",
        "not",
        "reduce",
        "is_finite",
        "constant",
        "broadcast_in_dim",
        "return",
    }
    assert set(extra) <= kinds_of
    assert extra["select"] <= len(kinds)  # jnp.where lowers to one shared function for each kind of leaf


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_is_the_whole_batch(n, weighted):
    batch = dict(BATCH)
    if weighted:  # some micro-batches hold nothing that counts
        batch |= {"mask": np.arange(12) % 6 != 1, "weight": RNG.uniform(0, 2, 12).astype("float32")}
    whole, metrics = run(make(optimizer=SGD, metrics=("accuracy",)), [batch])
    parts, found = run(make(optimizer=SGD, metrics=("accuracy",), accumulate=n), [batch])
    assert_trees_close(whole.params, parts.params)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(compute(metrics)[name], compute(found)[name], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_accumulate_in_float32_whatever_the_parameters_are(dtype):
    """The weights together are more than float16 holds, and each is less than bfloat16 adds to their sum."""
    values, weights = RNG.uniform(0.5, 1.5, 64).astype(dtype), RNG.uniform(1000, 3000, 64).astype("float32")

    def gradient(trained, model_state, key, batch):
        return {"w": batch["value"][0]}, Pass(batch["weight"][0], batch["weight"][0], {}, model_state, {})

    grads, out = jax.jit(accumulate(gradient, 64))({}, {}, jax.random.key(0), {"value": values, "weight": weights})
    assert grads["w"].dtype == dtype
    expected = np.average(values.astype("float64"), weights=weights)
    np.testing.assert_allclose(float(grads["w"]), expected, rtol=float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(out.weight, weights.sum(), rtol=1e-6)


def test_a_micro_batch_that_weighs_nothing_adds_nothing_not_even_nan():
    """An objective may divide by what it has counted."""

    def objective(v, batch):
        error = jnp.square(batch["x"] @ v.param("kernel", (4, 1), normal))[:, 0] * batch["mask"]
        mean = error.sum() / batch["mask"].sum()
        return mean, {"loss": Mean(error.sum(), batch["mask"].sum()), "scalar": mean}

    objective.takes_mask = True
    batch = {"x": X, "mask": (np.arange(12) % 2).astype("float32")}
    (whole, metrics), (parts, found) = (run(Trainer(objective, SGD, accumulate=n), [batch]) for n in (1, 2))
    assert_trees_close(whole.params, parts.params)
    for name in ("loss", "scalar"):
        np.testing.assert_allclose(compute(found)[name], compute(metrics)[name], rtol=1e-5)


def test_accumulation_threads_the_model_state_and_draws_anew():
    def noisy(v, x):
        return counting(v, x) + jax.random.normal(v.noise.rng("noise"), (x.shape[0], 3))

    trainer = make(noisy, accumulate=3)
    state, _ = run(trainer, [BATCH])
    mean = np.zeros(4)
    for i in range(3):
        mean = 0.9 * mean + 0.1 * X[i::3].mean(0)
    np.testing.assert_allclose(state.state["norm"]["mean"], mean, rtol=1e-5, atol=1e-6)


def test_accumulation_over_a_convolution_is_unrolled_on_cpu_and_equal():
    def conv(v, x):
        kernel = v.param("kernel", (3, 3, 1, 3), normal)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(y).mean((1, 2))

    batch = {"x": RNG.normal(size=(8, 6, 6, 1)).astype("float32"), "label": np.arange(8) % 3}
    whole, _ = run(make(conv, SGD), [batch])
    trainer = make(conv, SGD, accumulate=4)
    parts, _ = run(trainer, [batch])
    assert_trees_close(whole.params, parts.params)
    text = step_of(trainer).lower(parts, batch).as_text()
    if jax.default_backend() == "cpu":
        assert "stablehlo.while" not in text


def test_clipping_is_by_the_global_norm():
    trainer = make(optimizer=SGD, clip=0.1)
    start = trainer.init(0, BATCH)
    clipped, metrics = run(trainer, [BATCH], start)
    tx = optax.chain(optax.clip_by_global_norm(0.1), SGD)
    expected, _ = run(make(optimizer=tx), [BATCH])
    assert_trees_close(clipped.params, expected.params)
    _, grads = gradient_by_hand(start.params, BATCH)
    norm = np.sqrt(sum(np.sum(np.square(x, dtype="float64")) for x in jax.tree.leaves(jax.device_get(grads))))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    assert metrics["gradient_norm"] > 0.1


def test_a_small_gradient_is_not_clipped():
    assert_trees_equal(run(make(clip=1e6), [BATCH])[0].params, run(make(), [BATCH])[0].params)


def test_ema_of_bfloat16_parameters_is_float32_and_moves():
    """0.999 is 1 in bfloat16: the first parameters would never be forgotten."""
    trainer = make(ema=0.999, policy=sw.Policy("bfloat16", param="bfloat16"))
    state = trainer.init(0, BATCH)
    wide = lambda params: jax.tree.map(lambda x: x.astype("float32"), jax.device_get(params))  # noqa: E731
    state = state.replace(step=jnp.int32(10**6))  # when 0.999 has set in
    ema = wide(state.params)
    for _ in range(3):
        state, _ = run(trainer, [BATCH], state)
        ema = jax.tree.map(lambda e, p: np.float32(0.999) * e + np.float32(0.001) * p, ema, wide(state.params))
    assert_trees_close(state.ema, ema)
    assert {x.dtype for x in jax.tree.leaves(trainer.eval_variables(state))} == {jnp.dtype("bfloat16")}
    assert np.isfinite(trainer.evaluate(state, BATCH)["loss"])


def test_ema_follows_its_formula_and_is_what_is_evaluated():
    trainer = make(ema=0.25)
    state = trainer.init(0, BATCH)
    ema = jax.device_get(state.params)
    for decay in (1 / 10, 2 / 11, 0.25):  # its warm-up, and then the decay itself
        state, _ = run(trainer, [BATCH], state)
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, jax.device_get(state.params))  # noqa: B023
    assert_trees_close(state.ema, ema)
    found = trainer.evaluate(state, BATCH)
    np.testing.assert_allclose(found["loss"], gradient_by_hand(ema, BATCH)[0], rtol=1e-5)
    assert found["loss"] != pytest.approx(float(gradient_by_hand(state.params, BATCH)[0]), rel=1e-4)


def test_what_is_averaged_is_what_the_state_says_whatever_another_trainer_would_train():
    state, _ = run(make(ema=0.9, trainable="head"), [BATCH])
    expected = make(trainable="head").evaluate(state, BATCH)
    assert make().evaluate(state, BATCH) == expected


def test_averaged_parameters_run_with_averaged_statistics():
    """Of one step: a tenth of what was, nine tenths of what is. A count is no statistic, and stays the newest."""

    def centred(v, x):
        mean, count = v.norm.state("mean", (4,), zeros), v.norm.state("count", (), zeros, dtype="int32")
        if v.train:
            v.norm.put(mean=0.9 * mean + 0.1 * x.mean(0), count=count + 1)
        return mlp(v, x - mean)

    trainer = make(centred, ema=0.999)
    state, _ = run(trainer, [BATCH])
    statistics = 0.9 * np.asarray(state.state["norm"]["mean"])
    params, used = trainer.eval_variables(state)
    np.testing.assert_allclose(used["norm"]["mean"], statistics, rtol=1e-5)
    assert int(used["norm"]["count"]) == 1
    expected = gradient_by_hand(params, {**BATCH, "x": X - statistics})[0]
    np.testing.assert_allclose(trainer.evaluate(state, BATCH)["loss"], expected, rtol=1e-5)


def test_what_is_frozen_has_no_gradient_and_no_optimizer_memory():
    trainer = make(trainable="head", ema=0.9)
    before = trainer.init(0, BATCH)
    shapes = [x.shape for x in jax.tree.leaves((before.opt_state, before.ema))]
    assert shapes.count((8, 3)) == 3  # both moments and the running mean
    assert (4, 8) not in shapes
    after, _ = run(trainer, [BATCH] * 2, before)
    assert_trees_equal(after.params["hidden"], before.params["hidden"])
    assert not np.array_equal(after.params["head"]["kernel"], before.params["head"]["kernel"])
    # the gradient of what is frozen would be one more product of shape (4, 8)
    text = jax.jit(make(trainable="head", checks=False).step).lower(before.replace(ema=None, ok=None), BATCH).as_text()
    assert not re.search(r"dot_general.*-> tensor<(8x4|4x8)xf32>", text)
    assert_trees_close(trainer.eval_variables(after)[0]["hidden"], before.params["hidden"])


def overflowing(v, x):
    """A model whose gradient overflows float16 where the input is large."""
    return counting(v, x)


def test_a_skipped_step_of_float16_changes_nothing_but_the_scale():
    schedule = optax.linear_schedule(0.1, 0.0, 100)
    trainer = make(
        counting, optax.inject_hyperparams(optax.adam)(schedule), policy="float16", ema=0.9,
        scaling=LossScale(initial=2.0**10, interval=2),
    )  # fmt: skip
    good, bad = BATCH, {**BATCH, "x": X * np.float32(6e4)}
    one, metrics = run(trainer, [good])
    assert np.isfinite(metrics["loss"])
    two, _ = run(trainer, [bad], one)
    for name in ("params", "state", "opt_state", "ema", "ema_state", "rng"):
        assert_trees_equal(getattr(one, name), getattr(two, name))
    assert float(two.scale.scale) == 2.0**9
    assert int(two.scale.skipped) == 1
    assert int(two.step) == 2
    three, _ = run(trainer, [good, good], two)
    assert int(three.opt_state.count) == 3
    assert float(three.scale.scale) == 2.0**10
    assert not np.array_equal(three.state["norm"]["mean"], one.state["norm"]["mean"])
    assert bool(three.ok)  # an overflow is no failure


def test_gradients_of_float16_parameters_survive_a_scale_that_float16_does_not_hold():
    def model(v, x):
        return x @ v.param("kernel", (4, 3), lambda *args: normal(*args) / 100, dtype="float16")

    batch = {**BATCH, "x": X / 100}  # small gradients, for which the scale has grown
    tx = optax.sgd(0.5)
    trainer, full = make(model, tx, scaling=LossScale(initial=2.0**17)), make(model, tx)
    before = trainer.init(0, batch)
    after, expected = run(trainer, [batch], before)[0], run(full, [batch])[0]
    assert int(after.scale.skipped) == 0
    assert not np.array_equal(after.params["kernel"], before.params["kernel"])
    np.testing.assert_allclose(after.params["kernel"], expected.params["kernel"], rtol=2e-3)


def test_float16_and_bfloat16_stay_near_float32():
    full, _ = run(make(optimizer=SLOW_SGD), [BATCH] * 3)
    for dtype, tolerance in (("float16", 5e-3), ("bfloat16", 5e-2)):
        low, metrics = run(make(optimizer=SLOW_SGD, policy=dtype), [BATCH] * 3)
        assert_trees_close(full.params, low.params, rtol=tolerance, atol=tolerance)
        assert jax.tree.leaves(low.params)[0].dtype == jnp.float32
        assert metrics["loss"].dtype == jnp.float32
    assert make(policy="bfloat16").scaling is None


def test_auxiliary_losses_are_added_and_have_a_gradient():
    def regular(v, x):
        kernel = v.param("kernel", (4, 3), normal)
        v.loss("l2", 0.5 * jnp.sum(kernel**2))
        return x @ kernel

    trainer = make(regular, SLOW_SGD)
    before = trainer.init(0, BATCH)
    after, metrics = run(trainer, [BATCH], before)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def expected(kernel):
        loss = losses.softmax_cross_entropy(BATCH["x"] @ kernel, BATCH["label"]).mean()
        return loss + 0.5 * jnp.sum(kernel**2), loss

    kernel = np.asarray(before.params["kernel"])
    (_, loss), gradient = expected(kernel)
    np.testing.assert_allclose(after.params["kernel"], kernel - 0.1 * np.asarray(gradient), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["auxiliary_loss"], 0.5 * np.sum(kernel**2), rtol=1e-6)


def test_each_step_draws_anew_and_the_same_again():
    def draw(v, batch):
        return jnp.sum(v.param("w", (1,), normal)) * 0, {"draw": jax.random.uniform(v.rng("x"))}

    trainer = Trainer(draw, SLOW_SGD)

    def values():
        state, seen = trainer.init(3, BATCH), []
        for _ in range(4):
            state, metrics = run(trainer, [BATCH], state)
            seen.append(float(metrics["draw"]))
        return seen

    first = values()
    assert len(set(first)) == 4
    assert first == values()


def test_reduce_on_plateau_gets_the_value():
    tx = optax.chain(optax.sgd(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=2))
    _, metrics = run(make(optimizer=tx), [BATCH] * 6)  # nothing moves, so nothing improves
    assert compute({"x": metrics["plateau_scale"]})["x"] == 0.25


@pytest.mark.costs("a line search, alone and over micro-batches, is a large program each")
def test_lbfgs_with_its_line_search_solves_least_squares():
    target = X @ np.array([[1.0], [-2.0], [0.5], [3.0]], "float32")

    def linear(v, x):
        return x @ v.param("w", (4, 1), zeros)

    batch = {"x": X, "y": target}
    objective = supervised(linear, "squared_error", (), inputs="x", target="y")
    for n in (1, 3):
        state, metrics = run(Trainer(objective, optax.lbfgs(), accumulate=n), [batch] * 12)
        assert compute({"loss": metrics["loss"]})["loss"] < 1e-8
        np.testing.assert_allclose(state.params["w"][:, 0], [1, -2, 0.5, 3], atol=1e-3)


def test_an_injected_learning_rate_is_logged_as_used():
    tx = optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(1.0, 0.0, 10))
    _, metrics = run(make(optimizer=tx), [BATCH] * 3)
    assert compute({"lr": metrics["learning_rate"]})["lr"] == pytest.approx(0.8)


def test_a_given_schedule_is_logged_as_the_optimizer_uses_it():
    """The update of a gradient of one is the rate itself. What has no count of its own counts as the steps do."""
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    chain = optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(schedule))
    optimizers = {
        "sgd": optax.sgd(schedule),
        "micro": optax.MultiSteps(optax.sgd(schedule), 2),
        "micro chain": optax.MultiSteps(chain, 2),
        "groups": optax.multi_transform({"a": optax.sgd(schedule)}, "a"),
        "skipping": optax.apply_if_finite(optax.sgd(schedule), 5),
        "none": optax.identity(),
    }

    @jax.jit
    def four():
        rows = {}
        for name, tx in optimizers.items():
            state = TrainState(jnp.int32(0), {}, {}, tx.init(jnp.zeros(())), None)
            for _ in range(4):
                used, opt_state = tx.update(jnp.ones(()), state.opt_state, jnp.zeros(()))
                said = rate_metrics(schedule, state, opt_state)["learning_rate"].compute()
                rows.setdefault(name, []).append((said, -used))
                state = state.replace(step=state.step + 1, opt_state=opt_state)
        return rows

    rows = {name: np.array(found).T for name, found in four().items()}
    for name in ("sgd", "groups", "skipping"):
        np.testing.assert_allclose(rows[name][0], rows[name][1])
    for name in ("micro", "micro chain"):  # every other step only adds up, for the update of the next
        np.testing.assert_allclose(rows[name][0][1::2], rows[name][1][1::2])
        np.testing.assert_allclose(rows[name][0][::2], rows[name][0][1::2])
    np.testing.assert_allclose(rows["none"][0], [1, 0.75, 0.5, 0.25])


def test_a_plateau_scale_multiplies_an_injected_rate():
    tx = optax.chain(optax.inject_hyperparams(optax.sgd)(0.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    _, metrics = run(make(optimizer=tx), [BATCH] * 3)
    assert "plateau_scale" not in metrics
    assert float(metrics["learning_rate"].value) == 0.0


def test_a_failed_check_stops_the_state_where_it_was():
    trainer = make(counting, ema=0.9)
    one, metrics = run(trainer, [BATCH])
    assert metrics["checks"].compute() is True
    bad = {**BATCH, "label": np.where(np.arange(12) == 5, 3, BATCH["label"]).astype("int32")}
    two, metrics = run(trainer, [bad], one)
    assert "(root): label outside the 3 classes 0 to 2" in metrics["checks"].failed()
    three, metrics = run(trainer, [BATCH], two)
    assert metrics["checks"].compute() is True
    for name in ("params", "state"):
        assert_trees_equal(getattr(one, name), getattr(three, name))
    assert not bool(three.ok)


def test_a_loss_that_is_not_finite_is_flagged():
    bad = {**BATCH, "x": X.copy()}
    bad["x"][3, 1] = np.nan
    state, metrics = run(make(), [bad])
    assert metrics["checks"].failed() == ["the loss is not finite"]
    assert np.isfinite(state.params["head"]["kernel"]).all()


def rooted(v, x):
    """A finite loss whose gradient is NaN where an input is 0."""
    y = x @ v.param("kernel", (4, 3), normal)
    return y - jnp.sqrt(jnp.sum(y * y, -1, keepdims=True))


ZERO = {**BATCH, "x": np.where(np.arange(12)[:, None] == 5, 0, X).astype("float32")}


def steps_of(trainers, batches):
    """The states and metrics of a step on each batch for each trainer, from the same parameters, by one program."""
    params, _ = jax.tree.map(np.asarray, sw.init(trainers[0].objective, 0, BATCH))

    def all_of_them(batches):
        found = []
        for trainer in trainers:
            state = plan._complete(trainer, jax.random.key(0), params, {})
            for batch in batches:
                state, metrics = trainer.step(state, batch)
                found.append((state, metrics))
        return found

    return params, jax.jit(all_of_them)(batches)


def test_a_gradient_that_is_not_finite_is_flagged_and_changes_nothing():
    """Alone and clipped. Under loss scaling the step is skipped until the scale has fallen to 1."""
    trainers = [make(rooted, SLOW_SGD, **options) for options in ({}, {"clip": 1.0})]
    trainers.append(make(rooted, SLOW_SGD, policy="float16", scaling=LossScale(initial=2.0)))
    params, found = steps_of(trainers, [ZERO, ZERO])
    for i, (state, metrics) in enumerate(found):
        skips = i == len(found) - 2
        assert metrics["checks"].failed() == ([] if skips else [checks.NORM if i // 2 == 1 else checks.GRADIENTS])
        assert bool(state.ok) is skips
        assert np.isfinite(compute(metrics)["loss"])
        assert_trees_equal(state.params, params)
    assert [compute(metrics)["skipped_steps"] for _, metrics in found[-2:]] == [1, 1]


@pytest.mark.slow
def test_an_optimizer_that_looks_after_such_gradients_is_left_to():
    guards = optax.apply_if_finite(SLOW_SGD, 5), optax.chain(optax.zero_nans(), SLOW_SGD)
    skips = optax.MultiSteps(SLOW_SGD, 1, should_skip_update_fn=optax.skip_not_finite)
    params, found = steps_of([make(rooted, tx) for tx in (*guards, skips)], [ZERO, BATCH])
    for state, metrics in found:
        assert metrics["checks"].failed() == []
        assert bool(state.ok)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert not np.array_equal(found[1][0].params["kernel"], params["kernel"])
    _, [(state, metrics)] = steps_of([make(rooted, guards[0])], [{**BATCH, "x": np.full_like(X, np.nan)}])
    assert metrics["checks"].failed() == ["the loss is not finite"]  # batch statistics would not be, either


def test_all_finite_sees_every_entry_of_every_kind():
    """Large matrices are summed by a product on a CPU, whatever is in them."""
    shapes = {"kernel": (3, 5, 16, 24), "matrix": (64, 96), "bias": (7,), "scalar": ()}
    fine = {name: np.asarray(RNG.normal(size=shape) * 1e30, "float32") for name, shape in shapes.items()}
    fine["matrix"][:] = np.finfo("float32").max
    check = jax.jit(lambda tree: (all_finite(tree), all_finite(tree, alone=True)))
    assert [bool(x) for x in check(fine)] == [True, True]
    for name, x in fine.items():
        for bad in (np.nan, np.inf, -np.inf):
            broken = x.copy()
            broken[tuple(RNG.integers(0, n) for n in x.shape)] = bad
            assert [bool(x) for x in check({**fine, name: broken})] == [False, False], (name, bad)


def test_without_checks_there_are_no_bits():
    state, metrics = run(make(checks=False), [BATCH])
    assert set(metrics) == {"loss"}
    assert state.ok is None


@pytest.mark.costs("un-jitted, every operation is a program")
def test_plain_python_gives_the_same_and_really_runs_as_python():
    """Un-jitted, so with the least model that there is."""
    options = {"optimizer": SLOW_SGD, "accumulate": 2, "clip": 0.5}
    seen = []

    def linear(v, x):
        return x @ v.head.param("kernel", (4, 3), normal)

    def watched(v, x):
        seen.append(isinstance(x, jax.core.Tracer))
        return linear(v, x)

    trainer = make(watched, jit=False, **options)
    state = trainer.init(0, BATCH)
    seen.clear()
    after, _ = trainer.compiled.train(None)(state, BATCH)
    assert seen[-1:] == [False]  # the inputs are arrays one can print
    expected, _ = run(make(linear, **options), [BATCH])
    assert_trees_close(after.params, expected.params)


def test_the_step_keeps_every_shape_and_dtype():
    trainer = make(counting, ema=0.9, policy="float16", clip=1.0)
    state = shapes(trainer)
    after, _ = jax.eval_shape(trainer.step, state, BATCH)
    described = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype), getattr(x, "weak_type", False)), tree)  # noqa: E731
    assert described(jax.eval_shape(lambda x: x, state)) == described(after)

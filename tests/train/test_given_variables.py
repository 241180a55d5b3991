"""`Trainer.init` with variables made elsewhere: nothing is drawn, all land where they live, mistakes are named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import ConfigError
from sapwood import layers as L
from sapwood.train import Trainer, supervised

BATCH = {"x": np.ones((8, 4), "float32"), "label": np.zeros(8, "int32")}


def model(v, x):
    return L.Dense(3)(v.head, L.BatchNorm()(v.norm, L.Dense(8)(v.up, x)))


@functools.cache
def trainer(**options):
    return Trainer(supervised(model, inputs="x"), optax.adam(0.1), **options)


@functools.cache
def fresh(**options):
    """A state of which nothing was given."""
    return trainer(**options).init(0, BATCH)


@functools.cache
def step_of(**options):
    return jax.jit(trainer(**options).step, donate_argnums=0)


@functools.cache
def variables():
    """Variables made elsewhere, on the host, so that nobody can use them up."""
    params, state = jax.device_get(sw.init(model, 7, BATCH["x"]))
    return params, jax.tree.map(lambda x: x + np.float32(0.5), state)


def equal(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), one, other))


def test_what_is_given_is_what_the_state_holds():
    params, state = variables()
    made = trainer(ema=0.9).init(0, BATCH, params, state)
    assert equal((made.params, made.state, made.ema), (params, state, params))
    plain = fresh(ema=0.9)
    assert equal((made.opt_state, made.step), (plain.opt_state, plain.step))
    assert (jax.random.key_data(made.rng) == jax.random.key_data(plain.rng)).all()


def test_the_rest_is_made_as_ever():
    params, state = variables()
    assert equal(trainer().init(0, BATCH, params=params).state, fresh().state)
    assert equal(trainer().init(0, BATCH, state=state).params, fresh().params)


@pytest.mark.parametrize("options", [{}, {"mesh": "data=-1"}], ids=str)
@pytest.mark.parametrize("kind", [np.array, jnp.array])
def test_training_does_not_use_up_what_was_given(kind, options):
    params = jax.tree.map(kind, variables()[0])
    before = jax.tree.map(np.array, params)
    one = trainer(**options)
    state = one.init(0, BATCH, params)
    for _ in range(2):
        state, _ = step_of(**options)(state, one.put(BATCH))
    assert equal(params, before)
    assert not equal(state.params, before)


def test_on_a_mesh_each_array_is_put_where_it_lives():
    params, state = variables()
    made = trainer(mesh="data=-1").init(0, BATCH, params, state)
    assert equal((made.params, made.state), (params, state))
    where = (jax.tree.map(lambda x: x.sharding, each.params) for each in (made, fresh(mesh="data=-1")))
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, *where))


def test_nothing_is_drawn_for_what_is_given():
    def forbidden(key, shape, dtype):
        raise AssertionError("drawn")

    def given(v, x):
        return x @ v.head.param("kernel", (4, 3), forbidden)

    one = Trainer(supervised(given, inputs="x"), optax.sgd(0.1))
    kernel = {"head": {"kernel": np.ones((4, 3), "float32")}}
    assert (np.asarray(one.init(0, BATCH, kernel).params["head"]["kernel"]) == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["up"].pop("bias"), r"the params given lack up/bias of what the model declares"),
        (lambda p: p.pop("up"), r"lack up/bias and 1 more of what"),
        (lambda p: p["up"].update(kernal=p["up"]["kernel"]), r"have up/kernal, which the model has not; did you mean"),
        (lambda p: p["up"].update(kernel=np.ones((4, 9), "f4")), r"up/kernel is float32\[4,9\], the model declares f"),
        (lambda p: p["up"].update(kernel=np.ones((4, 8), "f2")), r"up/kernel is float16\[4,8\], the model declares f"),
        (lambda p: p["up"].update(kernel="weights.npz"), r"up/kernel is of type str"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    params = {name: dict(scope) for name, scope in variables()[0].items()}
    change(params)
    with pytest.raises(ConfigError, match=message):
        trainer().init(0, BATCH, params)


def test_a_list_is_no_tree_of_variables():
    with pytest.raises(ConfigError, match="nested dicts of arrays are expected, got list"):
        trainer().init(0, BATCH, [np.ones(3)])


def normalised(v, x):
    """Its state starts from what its parameters make of the first batch."""
    h = L.Dense(4)(v.up, x)
    first = h.mean(0)
    return L.Dense(3)(v.head, h - v.state("mean", (4,), lambda key, shape, dtype: first))


def test_initialisers_that_read_data_see_the_given_parameters():
    one = Trainer(supervised(normalised, inputs="x"), optax.sgd(0.1))
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, "float32"), one.init(0, BATCH).params)
    made = one.init(0, BATCH, params)
    np.testing.assert_allclose(made.state["mean"], np.full(4, 2.5), rtol=1e-6)  # 4 ones times 0.5, and the bias
    assert equal(made.params, params)


def test_arrays_of_another_device_come_to_the_default_one():
    params = jax.device_put(variables()[0], jax.devices()[-1])
    made = trainer().init(0, BATCH, params)
    assert made.params["up"]["kernel"].devices() == jnp.zeros(()).devices()


def test_it_can_be_traced():
    params, state = variables()
    shapes = jax.eval_shape(lambda params: trainer().init(0, BATCH, params, state), params)
    assert shapes.params["up"]["kernel"].shape == (4, 8)

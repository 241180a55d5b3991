"""What users of Keras and PyTorch type first: each name is answered, and what the answer says to write exists."""

import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core import migration_hints

X = np.ones((4, 8), np.float32)
Y = np.array([0, 1, 0, 1])


class Anywhere:
    """A cursor that any layer may be called with."""

    def __getattr__(self, name):
        return {"kernel": np.ones((8, 10), np.float32), "bias": np.zeros(10, np.float32)}

    def loss(self, name, x):
        return x


@pytest.fixture(scope="module")
def names():
    """What stands in the table's code. A trainer looks at what it is given, and does nothing."""
    model = L.Dense(2)
    objective = sw.supervised(model, inputs="features")
    real = sw.Trainer(objective, optax.sgd(0.1))
    params, state = sw.init(model, 0, X)

    def holds(f):
        def call(*args, **options):
            inspect.signature(f).bind(*args, **options)
            return sw.train.Result({}, [])

        return call

    methods = {name: holds(getattr(real, name)) for name in ("init", "step", "evaluate", "predict")}
    trainer = types.SimpleNamespace(fit=holds(functools.partial(sw.train.fit, real)), objective=objective, **methods)
    return {
        "sw": sw, "L": L, "jax": jax, "jnp": jnp, "optax": optax, "v": Anywhere(), "x": X, "y": Y, "w": np.ones(4),
        "model": model, "objective": objective, "params": params, "state": state, "trainer": trainer,
        "batch": {"features": X, "label": Y}, "penalty": 0.0, "first": 0.0, "second": 0.0,
        "data": sw.data.load((X, Y)),
    }  # fmt: skip


TABLES = {name: table for name, table in vars(migration_hints).items() if name.isupper() and name[0] != "_"}
PLACES = {
    "TRAINER": inspect.signature(sw.Trainer).parameters,
    "FIT": inspect.signature(sw.train.fit).parameters,
    "SUPERVISED": inspect.signature(sw.supervised).parameters,
    "EVALUATE": inspect.signature(sw.Trainer.evaluate).parameters,
    "LOAD": inspect.signature(sw.data.load).parameters,
    "CALLBACKS": {
        name for kind in (sw.train.EarlyStopping, sw.train.ReduceOnPlateau) for name in kind.__dataclass_fields__
    },
    "OPTIONS": {name for layer in L.__all__ for name in getattr(getattr(L, layer), "__dataclass_fields__", ())},
}


@pytest.mark.parametrize("where", TABLES)
def test_what_the_table_says_to_write_exists(names, where):
    done = set()
    for name, (code, *word) in TABLES[where].items():
        assert len(word) <= 1, name
        if code.endswith("="):
            assert code[:-1] in PLACES[where], name
        elif code.startswith("from "):
            exec(code, {})
        elif code and code not in done:
            try:
                eval(code, dict(names))
            except Exception as error:
                error.add_note(f"{where}, {name}: {code}")
                raise
        assert code or word, name
        done.add(code)


def answered(run, error, says):
    with pytest.raises(error) as caught:
        run()
    assert says in str(caught.value)


def test_each_name_gets_its_answer():
    layer = L.Dense(2)
    for name, (code, *_) in migration_hints.LAYERS.items():
        answered(lambda: getattr(L, name.title()), AttributeError, code)  # noqa: B023
        if name not in migration_hints.SAPWOOD and not hasattr(sw, name):
            answered(lambda: getattr(sw, name), AttributeError, code)  # noqa: B023
    for name, (code, *_) in migration_hints.SAPWOOD.items():
        if not hasattr(sw, name):
            answered(lambda: getattr(sw, name), AttributeError, code)  # noqa: B023
    for name, (code, *_) in migration_hints.METHODS.items():
        answered(lambda: getattr(layer, name), AttributeError, code)  # noqa: B023
    state = sw.TrainState(step=0, params={}, state={}, opt_state=(), rng=None)
    for holder, table in (
        (sw.data, migration_hints.DATA),
        (sw.data.load((X, Y)), migration_hints.DATASET),
        (sw.train, migration_hints.TRAIN),
        (sw.train.callbacks, migration_hints.TRAIN),
        (state, migration_hints.STATE),
    ):
        for name, (code, *word) in table.items():
            if not hasattr(holder, name):
                answered(lambda: getattr(holder, name), AttributeError, code or word[0])  # noqa: B023
    for name, (code, *word) in migration_hints.LOAD.items():
        answered(lambda: sw.data.load((X, Y), **{name: 1}), TypeError, code or word[0])  # noqa: B023
    for name, (code, *word) in migration_hints.OPTIONS.items():
        holders = [x for x in map(vars(L).get, L.__all__) if isinstance(x, type) and issubclass(x, sw.Layer)]
        holders = [x for x in holders if not code.endswith("=") or code[:-1] in x.__dataclass_fields__]
        assert holders, name
        for holder in holders:
            if name not in holder.__dataclass_fields__:
                answered(lambda: holder(**{name: 1}), TypeError, code or word[0])  # noqa: B023


@pytest.mark.parametrize(
    ("written", "says"),
    {
        "L.Conv2D": "L.Conv(32, (3, 3))",
        "L.BatchNorm2d": "L.BatchNorm()",
        "L.MaxPooling2D": "L.MaxPool((2, 2))",
        "L.MaxPool1d": "L.MaxPool((2,))",
        "L.max_pooling2d": "L.MaxPool((2, 2))",
        "L.Embedding": "L.Embed(1000, 64)",
        "L.Dens": "'Dense'",
        "sw.Dense": "sapwood.layers.Dense",
        "sw.keras": "from sapwood import layers as L",
        "sw.Model": "a model is a function",
        "sw.superwised": "'supervised'",
        "L.Dense(8).forwards": "no attribute 'forwards'",
        "L.Dense(784, 10)": "the size of the input is read from the input",
        "L.Dense(10, 'relu')": "an activation is a call of its own",
        "L.Dense(10, units=3)": "features=",
        "L.Dense(10, kernel_inti=3)": "'kernel_init'",
        "L.RMSNorm(use_bias=False)": "no option 'use_bias'",
        "L.LayerNorm(64)": "the size of the input is read from the input",
        "L.BatchNorm(64)": "the size of the input is read from the input",
        "L.Sequential(L.Dense(8), jax.nn.relu)": "Sequential([...])",
        "L.MultiHeadAttention(8, causal=1)": "must be True or False",
        "sw.supervised(model, loss={'a': 'huber'})": "For several outputs",
        "sw.supervised(model, loss_fn='huber')": "loss=",
        "sw.supervised(L.Dense)": "a model is Dense(...)",
        "sw.Trainer(objective, optax.sgd(0.1), metrics=[])": "sw.supervised(model, metrics=",
        "trainer.fit(x, y, epochs=1)": "trainer.fit((x, y), epochs=2)",
        "trainer.fit((x, y), epochs=1, validation_split=0.2)": "validation=",
        "trainer.evaluate((x, y))": "takes a TrainState first",
        "trainer.evaluate(state, x, y)": "trainer.evaluate(state, (x, y))",
        "trainer.predict(x)": "takes a TrainState first",
        "trainer.predict(sw.train.Result(state, []), x)": "trainer.predict(result.state, data)",
        "trainer.evaluate(state, (x, y), return_dict=True)": "always gives a dict",
        "trainer.predict(state, x, verbose=0)": "prints nothing",
        "trainer.predict(state, x, batchsize=4)": "'batch_size'",
        "sw.train.EarlyStopping(restore_best_weights=True)": "restore=",
        "sw.train.EarlyStopping(patient=2)": "'patience'",
        "sw.train.ReduceOnPlateau(min_lr=1e-5)": "least=",
        "sw.train.ReduceLROnPlateau(patience=2)": "sw.train.ReduceOnPlateau",
        "sw.train.callbacks.EarlyStoping()": "'EarlyStopping'",
        "sw.data.DataLoader(data, batch_size=2)": "sw.data.batches",
        "sw.data.load('images', image_size=(8, 8))": "size=",
        "data.train_test_split(0.2)": "data.split(0.2)",
        "data.feature": "'features'",
        "state.parms": "'params'",
        "sw.supervised(model, metrics=['AUC'])": "'auc'",
        "sw.supervised(model, target=['a', 'b'])": "For several",
        "sw.Trainer(model, optax.sgd(0.1))": "sw.supervised(model",
        "sw.Trainer(objective, [optax.sgd(0.1), optax.adam(0.1)])": "optax.multi_transform",
        "trainer.summary()": "sw.summary(model, x)",
        "trainer.compile(loss='mse')": "sw.Trainer(",
    }.items(),
)
def test_the_first_line_of_a_newcomer(names, written, says):
    real = sw.Trainer(names["objective"], optax.sgd(0.1))
    state = sw.TrainState(step=0, params={}, state={}, opt_state=(), rng=None)
    answered(
        lambda: eval(written, names | {"trainer": real, "state": state}), (AttributeError, TypeError, ValueError), says
    )


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (lambda v, x: L.Dense(2)(v.head, x / 16), "sw.supervised(model)"),
        (lambda v, x: L.Dense(2)(v.head, x), "features float32[4, 8], label int"),
        (
            lambda v, batch: ((lambda v, x: L.Dense(2)(v.head, x))({"head": {}}, batch["features"]), {}),
            "sw.bind(params)",
        ),
    ],
)
def test_an_objective_that_is_a_model_or_takes_a_dict_for_a_cursor_is_told(objective, says):
    with pytest.raises((TypeError, AttributeError, ValueError)) as caught:
        sw.Trainer(objective, optax.sgd(0.1)).init(0, {"features": X, "label": Y})
    assert says in "".join(caught.value.__notes__)


def test_a_property_that_fails_says_why():
    class Block(sw.Layer):
        @property
        def size(self):
            return self.missing

    answered(lambda: Block().size, AttributeError, "'missing'")


def test_a_share_of_the_data_is_held_out():
    """Of four classes of unequal size, by the same draw as `Dataset.split`: what is held out is not trained on."""
    label = np.repeat([0, 1, 2, 3], [20, 10, 5, 5])
    data = {"x": np.eye(40, dtype=np.float32), "label": label}
    trainer = sw.Trainer(sw.supervised(L.Dense(4, bias=False), inputs="x"), optax.sgd(1.0))
    given = {"validation": np.float32(0.2), "steps_per_call": np.int64(1), "batch_size": np.int64(8)}
    state, history = trainer.fit(data, epochs=1, seed=3, progress=False, **given)
    assert int(state.step) == 4
    first = trainer.init(3, {"x": data["x"][:8], "label": label[:8]})
    moved = np.any(np.asarray(state.params["kernel"] != first.params["kernel"]), axis=1)
    assert np.bincount(label[moved]).tolist() == [16, 8, 4, 4]
    _, held = sw.data.load(data).split(0.2)  # whatever the seed: going on with another one must not see it
    assert sorted(held.column("x").argmax(1)) == np.flatnonzero(~moved).tolist()
    assert history[-1]["validation_loss"] == pytest.approx(trainer.evaluate(state, held)["loss"])
    answered(lambda: trainer.fit(data, epochs=1, validation=1.5), ValueError, "between 0 and 1")

"""Whether a run goes on as itself: what is seen to have changed, and what rightly is not."""

import dataclasses
import functools
import json
import os
import types
import warnings

import jax
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.data.loading import load
from sapwood.train import EarlyStopping, Trainer, supervised
from sapwood.train.record.describe_settings import describe
from sapwood.train.record.run_identity import changes, identity, require_same

X, Y = np.arange(40, dtype="float32").reshape(20, 2), np.arange(20) % 2
FACTOR = 0.5


def helper(outputs, target):
    return FACTOR * (outputs - target)


def loss(outputs, target):
    return helper(outputs, target) ** 2


def model(v, x):
    return L.Dense(2)(v.out, L.Dropout(0.1)(v.drop, x))


class Block(sw.Layer):
    """A layer of one's own."""

    width: int = 3

    def __call__(self, v, x):
        return self.body(v, x)

    def body(self, v, x):
        return L.Dense(self.width)(v.body, x)


def written(trainer=None, x=X, y=Y, validation=None, callbacks=(), **options):
    """What a checkpoint holds of a run, as JSON gives it back."""
    trainer = trainer or Trainer(supervised(model, inputs="features"), optax.adam(0.1), **options)
    held_out = None if validation is None else load(validation)
    return json.loads(json.dumps(identity(trainer, load((x, y)), held_out, callbacks)))


def learned(optimizer=None, objective=None):
    return Trainer(objective or supervised(model, inputs="features"), optimizer or optax.adam(0.1))


def cosine(steps):
    return optax.adamw(optax.cosine_decay_schedule(0.1, steps))


BEFORE = written()


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (lambda: written(learned(optax.nadam(0.1))),
         ["optimizer: nesterov of scale_by_adam was False and is now True"]),
        (lambda: written(learned(optax.adam(0.2))), ["optimizer: step_size of scale was -0.1 and is now -0.2"]),
        (lambda: written(learned(optax.sgd(0.1))),
         ["optimizer: update of GradientTransformation was scale_by_adam and is now identity"]),
        (lambda: written(learned(objective=supervised(model, "squared_error", inputs="features"))),
         ["objective: loss was sapwood:softmax_cross_entropy and is now sapwood:squared_error"]),
        (lambda: written(learned(objective=supervised(L.Dense(2), inputs="features"))),
         ["objective: model was model and is now sapwood:Dense"]),
        (lambda: written(clip=1.0), ["clip was None and is now 1.0"]),
        (lambda: written(ema=0.9), ["ema was None and is now 0.9"]),
        (lambda: written(accumulate=2), ["accumulate was 1 and is now 2"]),
        (lambda: written(trainable="out"), ["trainable was None and is now 'out'"]),
        (lambda: written(policy="bfloat16"), ["policy: compute was None and is now 'bfloat16'"]),
        (lambda: written(validation=(X, Y)), ["the validation data had no examples and now 20"]),
        (lambda: written(x=X[:19], y=Y[:19]), ["the data had 20 examples and now 19"]),
        (lambda: written(callbacks=[EarlyStopping()]),
         ["callbacks: 0 was not there and is now sapwood:EarlyStopping"]),
    ],
)  # fmt: skip
def test_what_has_changed_is_named_with_both_sides(now, said):
    found = changes(BEFORE, now())
    assert found[: len(said)] == said
    with pytest.raises(sw.ConfigError, match=r'r cannot go on as another run: .*resume="anyway"'):
        require_same("r", BEFORE, now(), True)
    assert require_same("r", BEFORE, now(), "anyway") == found


def test_other_data_of_equal_length_and_other_precision():
    x, y = X.copy(), Y.copy()
    x[0, 1], y[-1] = 7, 0
    one, other = changes(BEFORE, written(x=x, y=y))
    assert one.startswith("the data are others: 8 examples of 'features' were ")
    assert other.startswith("the data are others: 8 examples of 'label' were ")
    assert "int32[8] and are now float32[8]" in changes(BEFORE, written(y=Y.astype("float32")))[0]
    with jax.enable_x64(True):
        wide = written()
    assert "jax_enable_x64 was False and is now True" in changes(BEFORE, wide)


def test_the_same_again_is_the_same_wherever_it_runs():
    again = Trainer(supervised(model, inputs="features"), optax.adam(0.1), jit=False, checks=False, learning_rate=0.1)
    assert changes(BEFORE, written(again)) == []
    assert changes(BEFORE, written(dataclasses.replace(again, mesh="data=8"))) == []
    assert changes(None, BEFORE) == []  # a checkpoint of before
    assert changes({"python": BEFORE["python"]}, BEFORE) == []
    for optimizer in (optax.lbfgs, lambda: cosine(9), lambda: optax.inject_hyperparams(optax.adam)(0.1),
                      lambda: optax.contrib.muon(0.1)):  # fmt: skip
        assert describe(optimizer()) == describe(optimizer())
    assert changes(written(learned(cosine(9))), written(learned(cosine(18)))) == [
        "optimizer: decay_steps of cosine_decay_schedule was 9 and is now 18"
    ]


def edited(function, **changed):
    """The function of an edited file: another global beside it."""
    return types.FunctionType(function.__code__, {**function.__globals__, **changed}, function.__name__)


def test_ones_own_code_counts_and_so_does_what_it_calls_by_name():
    file: dict = {"__name__": __name__}
    exec("def helper(outputs, target):\n    return abs(outputs - target)", file)

    def say(function):
        before, now = (written(learned(objective=supervised(model, f, inputs="features"))) for f in (loss, function))
        return changes(before, now)

    assert say(edited(loss)) == []
    assert say(edited(loss, helper=edited(helper, FACTOR=2.0))) == ["objective: helper.FACTOR was 0.5 and is now 2.0"]
    assert say(edited(loss, helper=file["helper"])) == ["objective: the code of helper is another"]
    assert say(functools.partial(loss)) != []
    assert describe(lambda o: o + 1) == describe(lambda o: o + 1) != describe(lambda o: o + 2)
    assert describe(Block(3)) != describe(Block(4))
    body = Block.body
    before = describe(Block())
    Block.body = lambda self, v, x: L.Dense(self.width, bias=False)(v.body, x)
    try:
        assert describe(Block()) != before
    finally:
        Block.body = body


class Settings:
    scale = 1.0

    def __init__(self, scale):
        self.scale = scale


def module(**values):
    made = types.ModuleType("settings_of_ones_own")
    vars(made).update(values)
    return made


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"scale": 1.0}, {"scale": 2.0}),
        ({"scale": 1.0}, {"scale": 1.0, "bias": 0}),
        (np.ones(3), np.ones(3) * 2),
        ((1.0, [2]), (1.0, [3])),
        ((1.0,), (1.0, 2.0)),
        (types.SimpleNamespace(scale=1.0), types.SimpleNamespace(scale=2.0)),
        (Settings(1.0), Settings(2.0)),
        (Settings, type("Settings", (), {"scale": 2.0, "__module__": __name__})),
        (module(scale=1.0), module(scale=2.0)),
        (module(scale={"x": 1}), module(scale={"x": 2})),
        (functools.partial(abs, 1.0), functools.partial(abs, 2.0)),
    ],
)
def test_whatever_holds_numbers_counts_where_code_names_it(one, other):
    used = edited(lambda outputs, target: CONFIG.scale * outputs, CONFIG=one)  # noqa: F821
    before, same, now = (
        written(learned(objective=supervised(model, edited(used, CONFIG=x), inputs="features")))
        for x in (one, one, other)
    )
    assert changes(before, same) == []
    (said,) = changes(before, now)
    assert said.startswith("objective: test_whatever_holds_numbers_counts_where_code_names_it.<locals>.<lambda>.CONFIG")
    assert " was " in said


def test_the_environment_and_objects_of_libraries_do_not_count(monkeypatch):
    seen = edited(lambda outputs, target: E.get(L), E=os.environ, L=np.random.default_rng(0))  # noqa: F821
    before = describe(seen)
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    assert describe(seen) == before


@dataclasses.dataclass(frozen=True)
class Deep:
    rate: float
    unused: int = 0
    constant = 1.0

    def model(self, v, x):
        return self._first(x)

    def _first(self, x):
        return self._second * x

    @property
    def _second(self):
        return self.rate * self.constant


def test_a_method_uses_the_fields_that_what_it_calls_uses(monkeypatch):
    before = describe(Deep(1.0).model)
    assert describe(Deep(1.0, unused=1).model) == before != describe(Deep(2.0).model)
    monkeypatch.setattr(Deep, "constant", 2.0)
    assert describe(Deep(1.0).model) != before


def test_another_python_compiles_the_same_text_otherwise():
    now = json.loads(json.dumps(BEFORE).replace(BEFORE["python"], "cpython-399"))
    now["objective"]["code.model"] = "code 0"
    assert changes(BEFORE, now) == []
    now["objective"]["target"] = "'other'"
    assert changes(BEFORE, now) == ["objective: target was 'label' and is now 'other'"]


def test_an_entry_that_reads_otherwise_each_time_is_not_held_to():
    drawn = np.random.default_rng(0)
    data = load((X, Y)).map(lambda one: {**one, "noise": drawn.normal(size=2).astype("float32")})
    trainer = learned()
    assert sorted(identity(trainer, data, None, ())["data"]) == ["examples", "features", "label"]
    assert changes(identity(trainer, data, None, ()), identity(trainer, data, None, ())) == []


def test_what_is_large_is_written_briefly(tmp_path):
    words = [f"word{i}" for i in range(5000)]
    table = np.lib.format.open_memmap(tmp_path / "table.npy", mode="w+", dtype="float32", shape=(1 << 12, 1 << 8))

    def made(words, table, text="x" * 5000):
        return describe(lambda x: (words, table, text, x))

    found = made(words, table)
    assert sum(map(len, found.values())) < 500
    assert found == made(list(words), np.array(table))
    assert found != made([*words[:-1], "other"], table)
    assert found != made(words, table, "x" * 4999 + "y")
    assert found != made(words, np.ones_like(table))
    chain = None
    for _ in range(100_000):
        chain = (chain, chain)
    assert len(describe(lambda x: (chain, x))) < 6000


def test_what_code_says_of_itself_does_not_count():
    def function(text):
        file: dict = {"__name__": __name__}
        exec(text, file)
        return describe(file["f"])

    assert function("def f(x):\n    'said'\n    return x") == function("def f(x):\n    return x  # said")
    assert function("def f(x):\n    'said'\n    return 5") == function("def f(x):\n    return 5")
    assert function("def f(x):\n    'said'\n    return 5") != function("def f(x):\n    return 6")
    assert function("def f(x, y):\n    return x") != function("def f(x, *, y):\n    return x")
    assert function("def f(x):\n    try:\n        g()\n        h()\n    except E:\n        pass") != function(
        "def f(x):\n    try:\n        g()\n    except E:\n        pass\n    h()"
    )
    assert function("def f(x):\n    return 'said'") != function("def f(x):\n    return 'other'")
    assert function("f = lambda x: 'said'") != function("f = lambda x: 'other'")
    assert function("def f(x):\n    return [*('a' for _ in x)]") != function(
        "def f(x):\n    return [*('b' for _ in x)]"
    )


def test_what_holds_itself_and_what_has_no_value_is_described():
    def recursive(n):
        return recursive(n - 1) if n else odd

    class Odd:
        def __init__(self):
            self.me, self.key, self.table = self, jax.random.key(0), {"a": np.ones(2), "b": {1, 2}}

        def __call__(self):
            return self.me

        @classmethod
        def of(cls, x):
            return x

    odd = Odd()
    assert describe(recursive) == describe(recursive)
    assert describe(odd) == describe(Odd())
    assert describe(Odd.of) == describe(Odd.of)
    assert describe({1: 2, "1": 3, (): odd}) != describe({1: 2, "1": 4, (): odd})
    assert not any(" at 0x" in text for text in describe(odd).values())


@pytest.mark.costs("a short run that is resumed twice")
def test_a_resumed_run_tells_of_rows_that_are_not_its_own(tmp_path):
    def fit(epochs, **options):
        return learned().fit(load((X, Y)), epochs=epochs, batch_size=10, run=tmp_path, checkpoint_every=2, keep=9,
                             progress=False, seed=1, **options)  # fmt: skip

    log = tmp_path / "metrics.jsonl"
    _, history = fit(2)
    whole = log.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(2, resume=True).history == history
    damaged = whole.replace(b'"epoch": 1', b'"epoch": 7')
    log.write_bytes(damaged)
    with pytest.warns(UserWarning, match="does not hold the rows that the run has written up to step 4: they stay"):
        fit(2, resume=True)
    assert log.read_bytes() == damaged


@pytest.mark.parametrize("said", [5, [1], {"": 5}, "x"])
def test_what_a_stranger_wrote_is_no_traceback(said):
    now = {"python": "", "clip": {"": "1.0"}}
    assert changes({"clip": said}, now) == ["what it says of its clip was not written by Sapwood"]
    assert changes(said, now) == []

"""What programs on a CPU are compiled with, held to the compiled text."""

import re
import threading
import warnings
from platform import machine

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.runtime import compile_options, malloc
from sapwood.runtime.compile_cache import compile_cache

IMAGES = jnp.ones((8, 16, 16, 32))


def net(v, image):
    return L.Dense(4)(v.head, jax.nn.relu(L.Conv(8, (3, 3))(v.conv, image)).reshape(len(image), -1))


def handed_over(text):
    """The operations in fusions of the library that XLA hands work to."""
    bodies = dict(re.findall(r"^%(\S+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    called = re.findall(r"calls=%(\S+?), .*__ynn_fusion", text)
    return {op for name in called for op in re.findall(r" ([a-z][a-z-]*)\(", bodies[name])}


@pytest.mark.fresh_compile
@pytest.mark.costs("four programs with a convolution have to be compiled anew")
def test_no_convolution_is_handed_to_a_library_that_takes_one_thread_for_it():
    trainer = sw.Trainer(sw.supervised(net), optax.sgd(0.1))
    batch = {"image": IMAGES, "label": jnp.zeros(8, int)}
    state = trainer.init(0, batch)
    traced = jax.jit(trainer.step).trace(state, batch)
    if machine() == "x86_64":
        assert "convolution" in handed_over(traced.lower().compile().as_text())  # else it is time to forget all this
    step = compile_options.compiled(traced, "cpu").as_text()
    evaluate = trainer.compiled.evaluate.lower(state.params, state.state, batch).compile().as_text()
    predict = trainer.compiled.predict.lower(state.params, state.state, batch).compile().as_text()
    for text in (step, evaluate, predict):
        assert "convolution(" in text
        assert "convolution" not in handed_over(text)


@pytest.mark.fresh_compile
def test_nothing_else_is_compiled_otherwise():
    def f(x):
        return jax.nn.softmax(x @ x.T) @ x, x.sum(0), jnp.sin(x).max()

    lowered = jax.jit(f).lower(jnp.ones((256, 256)))
    plain, ours = (lowered.compile(options).as_text() for options in ({}, compile_options.options("cpu")))
    assert body(plain) == body(ours)


@pytest.mark.fresh_compile
@pytest.mark.slow
def test_a_step_has_the_same_numbers_with_less_of_llvm(step):
    lowered, args = step
    found = [
        lowered.compile(options)(*args)
        for options in (compile_options.OWN_CONVOLUTIONS, compile_options.options("cpu"))
    ]
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.fixture
def step():
    """A training step with what nets are made of, lowered, and what it takes."""

    def model(v, image):
        x = L.max_pool(jax.nn.gelu(L.BatchNorm()(v.norm, L.Conv(8, (3, 3))(v.conv, image))), (2, 2))
        x = x.reshape(len(x), -1, 8)
        x = L.LayerNorm()(v.layer_norm, x + L.MultiHeadAttention(2)(v.attention, x))
        return L.Dense(4)(v.head, L.Dropout(0.1)(v.dropout, x.mean(1)))

    trainer = sw.Trainer(sw.supervised(model), optax.sgd(0.1))  # Adam makes steps of rounding errors
    numbers = np.random.default_rng(0)
    batch = {"image": numbers.normal(size=(8, 16, 16, 3)).astype("float32"), "label": numbers.integers(0, 4, 8)}
    state = trainer.init(0, batch)
    return jax.jit(trainer.step).lower(state, batch), (state, batch)


def body(text):
    """The operations of a compiled program, without what its head says of it."""
    return text.split("\n", 1)[1]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_other_platforms_are_left_to_xla(platform):
    assert compile_options.options(platform) == {}


@pytest.fixture
def large():
    """A training step whose temporaries, several values of 16 MiB at once, no heap of a thread holds."""

    def f(x):
        layers = [x := jnp.tanh(x @ jnp.eye(64)) for _ in range(4)]
        return sum(layers[::-1]).sum()

    return jax.jit(jax.grad(f)).trace(jnp.ones((2**16, 64)))


@pytest.mark.fresh_compile
def test_what_a_cache_keeps_on_disk_is_in_one_piece_and_hands_over_to_the_same_in_several(large, tmp_path, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (2**16, 64))
    for found in ("compiled", "read"):
        with compile_cache(tmp_path), warnings.catch_warnings(), monkeypatch.context() as patched:
            warnings.simplefilter("error")
            settings = jax.config.jax_persistent_cache_min_compile_time_secs
            program = compile_options.compiled(large, "cpu")
            whole, before = program.program, program(x)
            assert whole.memory_analysis().temp_size_in_bytes > 2 * malloc.PIECE
            patched.setattr(compile_options, "AFTER", 0)
            program(x)
            assert program.made.result() is not None, found
            after = program(x)
            assert program.program is program.made.result() is not whole
            assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
            assert len(list(tmp_path.glob("jit_f-*-cache"))) == 1
            assert jax.config.jax_persistent_cache_min_compile_time_secs == settings


def test_a_cached_program_goes_on_where_its_successor_cannot_be_made(large, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_options, "AFTER", 0)
    whole = large.lower().compile()
    for successor in (lambda: None, lambda: 1 / 0):
        program = compile_options.UpgradingProgram(whole, successor)
        for _ in range(3):
            program(jnp.ones((2**16, 64)))
            program.made.exception()
        assert program.program is whole
        assert program.successor is None


class Watched:
    """A lock that says when somebody begins to wait for it."""

    def __init__(self, waiting):
        self.lock, self.waiting = threading.Lock(), waiting

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.waiting.set()
            self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


@pytest.mark.fresh_compile
def test_the_end_of_a_cache_waits_for_what_is_compiled_beside(tmp_path, monkeypatch):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    begun, waiting = threading.Event(), threading.Event()
    monkeypatch.setattr(compile_options.compile_cache, "_settings", Watched(waiting))

    def beside():
        with compile_options.compile_cache.unwritten():
            begun.set()
            waiting.wait(600)

    thread = threading.Thread(target=beside)
    try:
        with compile_cache(tmp_path):
            thread.start()
            assert begun.wait(600)
        assert waiting.is_set()
        assert jax.config.jax_persistent_cache_min_compile_time_secs == before
    finally:
        waiting.set()
        thread.join()


def test_options_that_xla_does_not_know_or_the_user_sets_are_left_out(monkeypatch):
    ours = compile_options.OWN_CONVOLUTIONS | compile_options.LESS_OF_LLVM
    assert compile_options._allowed({"xla_of_tomorrow": 1} | ours) == ours == compile_options.options("cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE")
    assert compile_options.options("cpu") == compile_options.LESS_OF_LLVM


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("xla_x=1", r"a dict of XLA's options is expected"),
        ({"--xla_x": 1}, r"without dashes: 'xla_x', not '--xla_x'"),
        ({"xla_x": [1]}, r"a value is a number, True, False or a string"),
    ],
)
def test_compiler_options_that_are_none(given, message):
    with pytest.raises(sw.ConfigError, match=message):
        sw.Trainer(sw.supervised(sw.layers.Dense(1)), optax.sgd(0.1), compiler_options=given)


def test_compiler_options_reach_xla_in_every_program_of_a_trainer():
    own = {"xla_backend_optimization_level": 0, "xla_no_such_option": True}
    x, y = np.ones((4, 2), "float32"), np.zeros(4, int)
    made = lambda own: sw.Trainer(sw.supervised(L.Dense(2), inputs="x"), optax.sgd(0.1), compiler_options=own)  # noqa: E731
    assert compile_options.options("cpu", own).items() >= own.items()
    trainer = made(own)
    assert hash(trainer) is not None
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        trainer.fit({"x": x, "label": y}, batch_size=4, epochs=1)
    state, _ = made({"xla_backend_optimization_level": 0}).fit({"x": x, "label": y}, batch_size=4, epochs=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        trainer.evaluate(state, {"x": x, "label": y})

"""Stacks as pipelines on eight simulated devices, against the same stack on one."""

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood import metrics, parallel
from sapwood.models import Decoder
from sapwood.parallel.pipeline.settings import Pipeline
from sapwood.parallel.topologies import ENVIRONMENT
from sapwood.train import next_token

SCHEDULES = ("gpipe", "interleaved", "1f1b")
DEEP, WIDE = "stage=4,data=2", "stage=2,fsdp=2,tensor=2"


def rules(**options):
    return dataclasses.replace(parallel.DEFAULT, min_size=1, pipeline=Pipeline(**options))


def place(mesh, **options):
    return parallel.placement(sw.mesh(mesh), rules(**options))


def shapes(model, x):
    """The shapes of a model's parameters and state, which no run needs."""
    spec = sw.spec(model, x)
    return tuple(jax.tree.map(lambda p: p.struct, found) for found in (spec.params, spec.state))


def traced(model, x, *args, on, params=None, train=False):
    """The shapes that come out of a run on a mesh: what only tracing can find, it has found then."""

    def run(params, state, x, *args):
        return sw.pure(model)(sw.bind(params, state, rng=0, train=train, place=on), x, *args)

    return jax.eval_shape(run, *(shapes(model, x) if params is None else (params, {})), x, *args)


# ---- the same numbers ------------------------------------------------------------------------------------------------


def block(v, x, mask, shift):
    """An auxiliary loss, a row of an argument for each example, an argument for all."""
    h = v.shard(jnp.tanh(L.Dense(16, axes=("embed", "mlp"))(v.up, x)), "batch", "mlp")
    v.loss("size", jnp.mean(jnp.square(h.astype(jnp.float32))))
    return (x + mask[:, None] * L.Dense(8, axes=("mlp", "embed"))(v.down, h) + shift).astype(x.dtype)


def piped(remat=None):
    return L.Scan(block, 8, remat, batched=(True, False))


def inputs():
    random = np.random.default_rng(1)
    return random.normal(size=(16, 8)).astype("float32"), random.random(16, "float32"), np.float32(0.1)


def everything(remat=None, policy=None, on=None):
    """Results, losses, and gradients of parameters, input and arguments."""

    def objective(params, x, mask, shift):
        v = sw.bind(params, rng=7, train=True, place=on, policy=policy)
        y, updates = sw.pure(piped(remat))(v, x, mask, shift)
        return jnp.sum(jnp.sin(y).astype(jnp.float32)) + updates.losses["size"], (y, updates.losses)

    return jax.jit(jax.value_and_grad(objective, (0, 1, 2, 3), has_aux=True))


@pytest.fixture(scope="module")
def stack():
    return sw.init(piped(), 0, *inputs())[0]


@pytest.fixture(scope="module")
def expected(stack):
    return {name: jax.device_get(everything(policy=name)(stack, *inputs())) for name in ("float32", "bfloat16")}


@pytest.mark.costs("a pipeline with its gradients, for eight devices")
@pytest.mark.parametrize(
    ("mesh", "schedule", "remat", "policy"),
    [
        (DEEP, "interleaved", None, "float32"),
        (DEEP, "1f1b", None, "float32"),
        (WIDE, "gpipe", "full", "float32"),
        (WIDE, "1f1b", "full", "bfloat16"),
        pytest.param(DEEP, "gpipe", None, "float32", marks=pytest.mark.slow),
        pytest.param(WIDE, "interleaved", "full", "bfloat16", marks=pytest.mark.slow),
        pytest.param(DEEP, "gpipe", None, "bfloat16", marks=pytest.mark.long),
        *(pytest.param(DEEP, s, "full", "float32", marks=pytest.mark.long) for s in SCHEDULES),
        *(pytest.param(WIDE, s, None, "float32", marks=pytest.mark.long) for s in SCHEDULES),
    ],
)
def test_pipeline_gives_the_numbers_of_the_stack(mesh, schedule, remat, policy, stack, expected):
    on = place(mesh, schedule=schedule, microbatches=8 if mesh == DEEP else 4)
    shardings = parallel.param_shardings(sw.spec(piped(), *inputs()).params, on.mesh, on.rules)
    assert all(s.spec[0] == "stage" for s in jax.tree.leaves(shardings))
    got = jax.device_get(everything(remat, policy, on)(jax.device_put(stack, shardings), *inputs()))
    # Sums in another order; in bfloat16 each of eight blocks rounds to 8 bits, and so does each micro-batch's share.
    exact = 1e-5 if policy == "float32" else 3e-2
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected[policy]), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, "float32") for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=exact * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


def text(rows):
    tokens = np.random.default_rng(0).integers(32, size=(3, rows, 17), dtype="i4")
    return [{"tokens": t[:, :-1], "targets": t[:, 1:]} for t in tokens]


def train(mesh=None, policy=None, remat=None, **options):
    """The losses of three steps of a transformer, and its parameters after them."""
    model = Decoder(vocabulary=32, depth=4, width=16, heads=4, mlp=32, remat=remat)
    on = {"mesh": sw.mesh(mesh), "rules": rules(**options)} if mesh else {}
    trainer = sw.Trainer(next_token(model), optax.adam(1e-2, eps=1e-3), policy=policy, **on)
    batches = text(16)
    state, step, losses = trainer.init(0, batches[0]), jax.jit(trainer.step), []
    for batch in batches:
        state, found = jax.block_until_ready(step(state, trainer.put(batch)))
        losses.append(metrics.compute(found)["loss"])
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def trained():
    return train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("stage=4,data=2", {"schedule": "gpipe"}),
        ("stage=2,data=2,sequence=2", {"schedule": "gpipe"}),
        ("stage=2,fsdp=2,tensor=2", {"schedule": "1f1b", "remat": "full"}),
        ("stage=2,fsdp=2,tensor=2", {"schedule": "interleaved"}),
    ],
)
def test_pipeline_trains_a_transformer_as_one_device_does(mesh, options, trained):
    losses, params = trained
    piped, moved = train(mesh, **options)
    np.testing.assert_allclose(piped, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max()), moved, params)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_pipeline_of_experts_sends_their_tokens_inside_a_stage(schedule):
    model = L.Scan(L.MixtureOfExperts(4, hidden=8, balance=0.0), 4)
    x = jax.random.normal(jax.random.key(0), (8, 4, 8))
    params, _ = sw.init(model, 0, x)

    def run(on):
        def objective(params):
            y, updates = sw.pure(model)(sw.bind(params, train=True, place=on), x)
            return jnp.sum(jnp.sin(y)) + updates.losses["z"], updates.captured

        return jax.block_until_ready(jax.jit(jax.value_and_grad(objective, has_aux=True))(params))

    got, want = run(place("stage=2,expert=4", schedule=schedule, microbatches=2)), run(None)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("experts", "masked", "said"),
    [
        (
            L.MixtureOfExperts(4, 8),
            False,
            r"blocks: the loss 'balance' of a mixture .*'stage', such as expert=4.*balance=0",
        ),
        (L.MixtureOfExperts(4, 8, balance=0), True, r"the loss 'z' of a mixture of experts under a mask .*\(z=0\)"),
        (L.MixtureOfExperts(4, 8, balance=0), False, None),
        (L.MixtureOfExperts(4, 8, balance=0, z=0), True, None),
    ],
)
@pytest.mark.parametrize("schedule", ["gpipe", pytest.param("1f1b", marks=pytest.mark.slow)])
def test_a_mixture_whose_losses_micro_batches_do_not_add_up_to_is_refused(experts, masked, said, schedule):
    model, x = L.Scan(experts, 4, batched=True), np.ones((8, 4, 8), "float32")
    inputs = (x, np.ones((8, 4), bool)) if masked else (x,)
    on = place("stage=4,data=2", schedule=schedule)
    variables = jax.tree.map(lambda p: p.struct, sw.spec(lambda v, *xs: model(v.blocks, *xs), *inputs).params)

    def run(params, train=True):
        v = sw.bind(params, train=train, place=on)
        return sw.pure(lambda v, *xs: model(v.blocks, *xs))(v, *inputs)[0]

    assert jax.eval_shape(functools.partial(run, train=False), variables).shape == x.shape  # without losses it is right
    if said is None:
        assert jax.eval_shape(run, variables).shape == x.shape
    else:
        with pytest.raises(sw.ConfigError, match=said):
            jax.eval_shape(run, variables)


def test_an_argument_of_the_size_of_the_batch_is_what_it_is_said_to_be():
    """Eight positions beside eight examples, one in each micro-batch, to which a piece of either kind can be added."""

    def add(v, x, positions):
        return x + (positions[:, None] if positions.ndim == 1 else positions)

    x, on = np.zeros((8, 8, 4), "float32"), place("stage=8")
    for positions, batched in ((np.arange(8.0), False), (np.arange(8.0)[:, None, None], True)):
        model = L.Scan(add, 8, batched=batched)
        run = jax.jit(lambda x, p, model=model: sw.pure(model)(sw.bind({}, place=on), x, p)[0])
        got = run(x, positions.astype("float32"))
        np.testing.assert_array_equal(got, x + 8 * (positions if batched else positions[:, None]))


@pytest.mark.costs("about running without jit, where each operation is a program")
def test_pipeline_needs_no_jit():
    x = np.arange(2, dtype="float32").reshape(2, 1)
    model = L.Scan(L.Dense(1, bias=False), 2)
    params = {"kernel": np.float32([2, 3]).reshape(2, 1, 1)}
    on = parallel.placement(sw.mesh("stage=2", devices=jax.devices()[:2]), rules())
    run = lambda x: sw.apply(model, params, {}, x, place=on)[0]  # noqa: E731
    np.testing.assert_array_equal(run(x), 6 * x)
    with jax.disable_jit():  # as Trainer(jit=False) has it
        np.testing.assert_array_equal(jax.grad(lambda x: (run(x) * x).sum())(x), 12 * x)


# ---- what a block may do ---------------------------------------------------------------------------------------------


@pytest.mark.costs("a pipeline with its gradients, for eight devices")
@pytest.mark.parametrize("schedule", ["gpipe", pytest.param("1f1b", marks=pytest.mark.slow)])
def test_each_microbatch_and_block_drops_its_own_and_the_backward_pass_the_same(schedule):
    @sw.layer
    def drop(v, x):
        return x * (1 + L.Dropout(0.5)(v.drop, jnp.ones_like(x)))  # 1 or 3 times x

    on, x = place("stage=4,data=2", schedule=schedule, microbatches=8), np.ones((16, 64), "float32")
    model = L.Scan(drop, 4)

    def run(x):
        y = sw.pure(model)(sw.bind({}, rng=0, train=True, place=on), x)[0]
        return jnp.sum(y), y

    (_, y), slope = jax.jit(jax.value_and_grad(run, has_aux=True))(x)
    np.testing.assert_array_equal(y, slope)  # linear in x: other masks in the backward pass would show
    assert set(np.unique(y).tolist()) == {1.0, 3.0, 9.0, 27.0, 81.0}  # one mask for all blocks would give 1 and 81
    assert len({row.tobytes() for row in np.asarray(y)}) == 16  # of the micro-batches, and of the rows in each


@pytest.mark.parametrize("schedule", ["gpipe", pytest.param("1f1b", marks=pytest.mark.slow)])
def test_nothing_of_an_idle_tick_leaks(schedule):
    def falls(v, x):
        """Fine for what comes from the block before; NaN, and NaN for its gradient, for what comes from elsewhere."""
        most = v.param("most", (), jax.nn.initializers.ones)
        v.loss("log", jnp.mean(jnp.log(most - x)))
        v.check(x < most, "too much")
        v.sow("least", jnp.min(most - x))
        return x - 2 + jnp.log(most - x)

    x = np.linspace(10.0, 10.5, 8, dtype="float32")[:, None]
    model, most, y = L.Scan(falls, 4), [], x
    for _ in range(4):  # what each block takes is just above what it gets
        most.append(float(y.max()) + 0.5)
        y = y - 2 + np.log(most[-1] - y)
    assert max(most[1:]) < float(x.min())  # so what waits for the first block is too much for any other

    def run(on):
        def objective(params, x):
            y, updates = sw.pure(model)(sw.bind(params, train=True, place=on), x)
            return jnp.sum(y) + updates.losses["log"], (y, updates)

        return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))({"most": np.float32(most)}, x)

    ((got, (y, updates)), slopes), ((value, (z, others)), like) = (
        jax.device_get(run(on)) for on in (place("stage=4,data=2", schedule=schedule, microbatches=4), None)
    )
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(y, z, rtol=1e-5)
    np.testing.assert_allclose(updates.losses["log"], others.losses["log"], rtol=1e-5)
    assert jax.tree.all((updates.checks, others.checks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), slopes, like)


def test_what_blocks_sow_and_check_comes_back_as_from_the_stack():
    def tells(v, x):
        v.sow("rows", x[:, 0])
        v.sow("mean", jnp.mean(x))
        v.check(x[:, 0] < 12.0, "too large")
        return x + 1

    model, x = L.Scan(tells, 4), np.arange(16, dtype="float32").reshape(8, 2)

    def run(on):
        return jax.device_get(jax.jit(lambda x: sw.pure(model)(sw.bind({}, place=on), x)[1])(x))

    got, want = run(place("stage=2,data=4", schedule="interleaved")), run(None)
    jax.tree.map(np.testing.assert_allclose, got.captured, want.captured)
    assert {k: bool(np.all(ok)) for k, ok in got.checks.items()} == {"too large": False}


def test_convolutions_on_a_cpu_are_unrolled_in_a_pipeline_too():
    model, x, on = L.Scan(L.Conv(2, (3,), bias=False), 4), np.ones((8, 5, 2), "float32"), place("stage=2,data=4")
    run = jax.jit(jax.grad(lambda p, x: sw.pure(model)(sw.bind(p, place=on), x)[0].sum()))
    assert "stablehlo.while" not in run.lower(shapes(model, x)[0], x).as_text()


def test_a_placement_of_ones_own_has_no_stages():
    model, kernel = L.Scan(L.Dense(2, bias=False), 2), np.ones((2, 2, 2), "float32")
    run = jax.jit(lambda kernel, x: sw.apply(model, {"kernel": kernel}, {}, x, place=lambda axes, shape: None)[0])
    np.testing.assert_array_equal(run(kernel, np.ones((3, 2), "float32")), 4)


def test_declaring_and_first_values_see_the_whole_stack(stack):
    on = place(DEEP)
    born = parallel.init(piped(), 0, *inputs(), mesh=on.mesh, rules=on.rules)[0]
    jax.tree.map(np.testing.assert_array_equal, born, stack)


# ---- what cannot be --------------------------------------------------------------------------------------------------


def test_a_nested_stack_runs_inside_its_stage():
    def outer(v, x):
        return L.Scan(L.Dense(2), 3)(v.inner, x)

    x = np.ones((8, 2), "float32")
    assert traced(L.Scan(outer, 4), x, on=place(DEEP))[0].shape == x.shape


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (6, {}, r"^blocks: 6 blocks do not divide into 4 stages \(mesh data=2,stage=4\); stage=1 or 2 or 3 or 6 works "
                r"with 6 blocks, and 8 blocks work with stage=4"),
        (4, {"schedule": "interleaved"}, r"^blocks: 4 blocks do not divide into 4 stages in 2 rounds \(.*\); stage=1 or"
                                         r" 2 or rounds=1 works with 4 blocks, and 8 blocks work with stage=4"),
        (3, {"schedule": "interleaved", "rounds": 2}, r"^blocks: 3 blocks .*\); 8 blocks work with stage=4"),
    ],
)  # fmt: skip
def test_stages_that_do_not_divide_the_blocks(n, options, message):
    def model(v, x):
        return L.Scan(L.Dense(2), n)(v.blocks, x)

    with pytest.raises(sw.ConfigError, match=message):
        traced(model, np.ones((16, 2), "float32"), on=place(DEEP, **options))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (16, {"microbatches": 6}, r"blocks: a batch of 16 does not divide into 6 micro-batches of a pipeline \(mesh "
                                  r"data=2,stage=4\): their number must be a multiple of the 4 stages on each of "
                                  r"data=2; microbatches=4 or 8 works with it"),
        (16, {"microbatches": 16}, r"each must have as many rows as the others on each of data=2; microbatches=4 or 8"),
        (24, {"schedule": "interleaved", "microbatches": 2}, r"a multiple of the 4 stages.*microbatches=4 or 12 works"),
        (20, {}, r"a batch of 20 does not divide into the micro-batches.*; a batch of 16 works"),
        (4, {}, r"a batch of 4 does not divide.*; a batch of 8 works"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::sapwood.parallel.ShardingWarning")
def test_microbatches_that_do_not_divide_the_batch(rows, options, message):
    def model(v, x):
        return L.Scan(L.Dense(2), 8)(v.blocks, x)

    with pytest.raises(sw.ConfigError, match=message):
        traced(model, np.ones((rows, 2), "float32"), on=place(DEEP, **options))


def test_batch_statistics_are_refused_in_training_and_read_otherwise():
    model, x = L.Scan(L.BatchNorm(), 4), np.ones((8, 2), "float32")
    assert traced(model, x, on=place(DEEP))[0].shape == x.shape
    with pytest.raises(sw.EffectError, match=r"mean: the blocks of a pipeline cannot put state: each sees one micro"):
        traced(model, x, on=place(DEEP), train=True)


@pytest.mark.parametrize(
    ("batched", "args", "error", "message"),
    [
        (None, (1.0, np.ones(8, "float32")), sw.ConfigError,
         r"^blocks: args\[1\] of the stack, of shape \(8,\), has a first dimension of the size of the batch, .* "
         r"Say whether it goes with the examples, Scan\(batched=True\), or is the same for all, Scan\(batched=False\)"),
        ((False, None), (1.0, {"mask": np.ones((8, 2), "float32")}), sw.ConfigError,
         r"args\[1\]\['mask'\] of the stack, of sh"),
        (True, (np.ones((1, 2), "float32"),), sw.InputError,
         r"args\[0\] of .*\(1, 2\), is batched: a first dimension of 8, the"),
        ((True, False), (1.0,), sw.ConfigError, r"batched=\(True, False\) speaks for 2 arguments beside x, .* 1"),
    ],
)  # fmt: skip
def test_whether_an_argument_goes_with_the_examples_must_be_said(batched, args, error, message):
    def model(v, x, *args):
        return L.Scan(lambda v, x, *args: L.Dense(2)(v, x), 4, batched=batched)(v.blocks, x, *args)

    x = np.ones((8, 2), "float32")
    params = {"blocks": shapes(L.Scan(L.Dense(2), 4), x)[0]}
    with pytest.raises(error, match=message):
        traced(model, x, *args, on=place(DEEP), params=params)


def test_what_is_handed_on_must_have_the_batch():
    model = L.Scan(lambda v, x: (x[0] + x[1], x[1]), 4)
    with pytest.raises(sw.InputError, match=r"the leading dimension of all .* got arrays of shapes \(8, 2\), \(\)"):
        traced(model, (np.ones((8, 2), "float32"), np.float32(1)), on=place(DEEP), params={})


def test_whole_numbers_of_microbatches_have_no_mean():
    def counts(v, x):
        v.sow("positive", jnp.sum(x > 0))
        return x

    with pytest.raises(sw.EffectError, match=r"positive: int32\[\] was sown in each of 4 micro-batches"):
        traced(L.Scan(counts, 4), np.ones((8, 2), "float32"), on=place(DEEP), params={})


def test_a_model_without_a_stack_is_split_by_its_batch():
    on = place(DEEP)
    assert on(("batch", "embed"), (16, 4)).spec[0] == ("data", "stage")
    assert parallel.shards(parallel.batch_sharding(on.mesh, on.rules)) == 8


# ---- memory and collectives ------------------------------------------------------------------------------------------


def temporaries(schedule, microbatches):
    """Bytes that a training step of four stages needs beside its arguments, with two rows in a micro-batch."""
    on = parallel.placement(
        sw.mesh("stage=4", devices=jax.devices()[:4]), rules(schedule=schedule, microbatches=microbatches)
    )
    model, x = L.Scan(lambda v, x: jnp.tanh(L.Dense(64)(v, x)), 8), jnp.ones((2 * microbatches, 32, 64))

    def loss(params, x):
        return jnp.sum(jnp.sin(sw.pure(model)(sw.bind(params, place=on), x)[0]))

    params, _ = sw.init(model, 0, x)
    params = jax.device_put(params, parallel.param_shardings(sw.spec(model, x).params, on.mesh, on.rules))
    x = jax.device_put(x, parallel.batch_sharding(on.mesh, on.rules))
    return jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_pipeline_memory_of_1f1b_does_not_grow_with_the_microbatches():
    one = 2 * 32 * 64 * 4  # bytes of a micro-batch's activations
    grown = {s: (temporaries(s, 64) - temporaries(s, 16)) / one / 48 for s in ("gpipe", "1f1b")}
    print(f"\nactivations kept for each micro-batch more, in sizes of a micro-batch: {grown}")
    assert grown["gpipe"] > 2 + 1  # each of two blocks keeps its own, and the stage its input
    assert grown["1f1b"] < 2  # a quarter of what comes in, what goes out and their gradients


ON_A_TPU = """
import dataclasses, sys
import jax, jax.numpy as jnp, optax
import sapwood as sw
from sapwood import parallel
from sapwood.models import Decoder
from sapwood.parallel.pipeline.settings import Pipeline
from sapwood.train import next_token
from sapwood.train.state import plan
mesh = sw.mesh("stage=4,data=4", devices=parallel.topology("v5e:4x4"))
rules = dataclasses.replace(parallel.DEFAULT, pipeline=Pipeline(schedule=sys.argv[1], microbatches=8))
model = Decoder(vocabulary=512, depth=8, width=256, heads=4, remat="full")
trainer = sw.Trainer(next_token(model), optax.sgd(1e-2), mesh=mesh, rules=rules, policy="bfloat16")
tokens = jax.ShapeDtypeStruct((64, 256), "int32", sharding=trainer.batch_sharding)
batch = {"tokens": tokens, "targets": tokens}
state = plan.plan(trainer, batch).shapes
print(jax.jit(trainer.step, donate_argnums=0).lower(state, batch).compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.fresh_compile  # as it is for a TPU
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "sapwood[plan]"'
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pipeline_on_a_tpu_hands_on_and_gathers_no_stack(schedule):
    """The kernel of the logits, which lies whole outside of the stack, is updated in pieces and gathered again."""
    done = subprocess.run(
        [sys.executable, "-c", ON_A_TPU, schedule], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sent = Counter(
        re.findall(r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", done.stdout)
    )
    print(schedule, sent)
    assert sent["collective-permute"] > 0
    assert not sent["all-to-all"]
    gathered = re.findall(r"= (\S+?)\{\S* all-gather(?:-start)?\(", done.stdout)
    assert gathered == ["f32[256,512]"]

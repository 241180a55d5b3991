"""Scan against the same blocks unrolled: initial values, results, gradients, state, dropout masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.core.target_platform import compiling_for
from sapwood.parallel.place_activations import placement

N = 3


@sw.layer
def block(v, x, shift=0.0):
    y = L.BatchNorm()(v.norm, jnp.tanh(L.Dense(4)(v.dense, x)))
    v.loss("size", jnp.mean(jnp.square(y)))
    return x + L.Dropout(0.5)(v.drop, y) + shift


def unrolled(v, x, shift=0.0):
    for i in range(N):
        x = block(v[i], x, shift)
    return x


@pytest.fixture(scope="module")
def start():
    x = np.random.default_rng(1).normal(size=(8, 4)).astype("float32")
    return x, *jax.device_get(sw.init(L.Scan(block, N), 0, x))


@pytest.mark.costs("each shape of two stacks has a program of its own")
def test_starts_from_the_same_numbers_as_the_unrolled_stack(start):
    x, params, state = start
    for stacked, plain in zip((params, state), jax.device_get(sw.init(unrolled, 0, x)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, stacked, sw.stack(plain))


def run(model, params, state, x, shift):
    """Result, next state, losses and gradient of a training run, under jit."""

    def objective(params, x):
        y, updates = sw.pure(model)(sw.bind(params, state, rng=7, train=True), x, shift)
        return jnp.sum(jnp.sin(y)), (y, updates.state, updates.losses)

    (_, aux), gradient = jax.device_get(jax.jit(jax.value_and_grad(objective, has_aux=True))(params, x))
    return *aux, gradient


@pytest.fixture(scope="module")
def expected(start):
    x, params, state = start
    y, state, losses, gradient = run(unrolled, sw.unstack(params), sw.unstack(state), x, 0.5)
    return y, sw.stack(state), sum(block["size"] for block in losses.values()), sw.stack(gradient)


@pytest.mark.costs("three blocks with their gradients, scanned and unrolled")
@pytest.mark.parametrize("remat", [None, "nothing_saveable", jax.checkpoint_policies.dots_saveable])
def test_trains_as_the_unrolled_stack(remat, start, expected):
    x, params, state = start
    y, state, losses, gradient = run(L.Scan(block, N, remat), params, state, x, 0.5)
    np.testing.assert_array_equal(y == x + N * 0.5, expected[0] == x + N * 0.5)  # what every copy dropped
    for a, b in zip((y, state, losses["size"], gradient), expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.fresh_compile  # the bits of the programs that users run
def test_evaluates_bit_for_bit_as_the_unrolled_stack(start):
    x, params, state = start
    scanned = jax.jit(lambda p, s: sw.apply(L.Scan(block, N), p, s, x)[0])(params, state)
    plain = jax.jit(lambda p, s: sw.apply(unrolled, p, s, x)[0])(sw.unstack(params), sw.unstack(state))
    np.testing.assert_array_equal(scanned, plain)


def test_each_copy_drops_its_own_entries():
    x = np.ones((4, 64), "float32")
    model = L.Scan(sw.layer(lambda v, x: x * (L.Dropout(0.5)(v.drop, jnp.ones_like(x)) + 1)), 3)
    y = jax.jit(lambda x: sw.apply(model, {}, {}, x, rng=0, train=True)[0])(x)
    factors = {1.0, 3.0, 9.0, 27.0}  # 0 to 3 of the copies kept an entry: one shared mask would give 1 and 27 alone
    assert set(np.unique(y).tolist()) == factors


def test_declares_stacked_parameters():
    model = L.Scan(L.Dense(4, axes=("embed", "mlp")), 5)
    kernel = sw.spec(model, jnp.ones((2, 4))).params["kernel"]
    assert (kernel.shape, kernel.axes) == ((5, 4, 4), ("layers", "embed", "mlp"))
    other = sw.spec(L.Scan(L.Dense(4, axes=("embed", "mlp")), 5, axis="stage"), jnp.ones((2, 4)))
    assert other.params["kernel"].axes == ("stage", "embed", "mlp")


def test_policy_casts_what_is_carried():
    params, x = {"kernel": np.ones((2, 4, 4), "float32")}, np.ones((2, 4), "float32")
    model = L.Scan(L.Dense(4, bias=False), 2)
    y = jax.jit(lambda params, x: sw.apply(model, params, {}, x, policy="bfloat16")[0])(params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, 16)


def test_is_one_loop_unless_it_convolves_on_cpu():
    dense = L.Scan(L.Dense(4, bias=False), 3)
    lowered = jax.jit(lambda p, x: dense(p, x)).lower(
        {"kernel": np.ones((3, 4, 4), "float32")}, np.ones((2, 4), "float32")
    )
    assert lowered.as_text().count("stablehlo.while") == 1
    for remat in ("nothing_saveable", None):
        conv = L.Scan(L.Conv(2, (3,), bias=False), 3, remat=remat)
        params, x = {"kernel": np.ones((3, 3, 2, 2), "float32")}, np.ones((1, 5, 2), "float32")
        lowered = jax.jit(lambda p, x: conv(p, x)).lower(params, x)  # noqa: B023
        assert "stablehlo.while" not in lowered.as_text()


def test_remat_saves_memory(start):
    x, params, state = start

    def residuals(remat, place=None):
        def objective(params):
            return sw.pure(L.Scan(block, N, remat))(sw.bind(params, state, rng=7, train=True, place=place), x)[0].sum()

        pull = jax.eval_shape(lambda params: jax.vjp(objective, params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    products, everything = residuals("dots_saveable"), residuals("everything_saveable")
    assert residuals("nothing_saveable") < products < everything
    assert residuals(None) == products  # in a loop on a CPU
    on_mesh = placement(jax.make_mesh((8,), ("data",)))
    assert residuals(None, on_mesh) == residuals("everything_saveable", on_mesh)  # or collectives would run again
    with compiling_for("tpu"):
        assert residuals(None) == everything


def test_what_a_block_prints_it_prints_once(capfd):
    def talks(v, x):
        jax.debug.print("here {}", x.sum())
        return L.Dense(4)(v, x)

    params, x = (
        {"kernel": np.ones((N, 4, 4), "float32"), "bias": np.ones((N, 4), "float32")},
        np.ones((2, 4), "float32"),
    )
    jax.grad(lambda params: L.Scan(talks, N)(params, x).sum())(params)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("here") == N


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, sw.ConfigError, "n must be an integer above 0"),
        ({"n": 2, "remat": "dots_savable"}, sw.ConfigError, "no remat policy; did you mean 'dots_saveable'"),
        ({"n": 2, "remat": True}, sw.ConfigError, "True is no remat policy"),
        ({"n": 2, "batched": [True]}, sw.ConfigError, r"batched must be True, False, a tuple .* got \[True\]"),
    ],
)
def test_refuses_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        L.Scan(block, **options)


def test_a_wrong_depth_names_the_parameter():
    with pytest.raises(ValueError, match=r"kernel has shape \(2, 4, 4\); stack\(3\) expects 3"):
        L.Scan(L.Dense(4, bias=False), 3)({"kernel": np.ones((2, 4, 4), "float32")}, np.ones((2, 4), "float32"))


@sw.layer
def flagged(v, x, double, how):
    y = L.Dense(4, bias=False)(v, x)
    return getattr(jnp, how)(2 * y if double else y)


def test_what_is_no_array_is_left_alone_with_remat_too(draw):
    params, x = {"kernel": draw(N, 4, 4)}, draw(2, 4)

    def run(params, x):
        return [jax.value_and_grad(lambda p, r=r: L.Scan(flagged, N, r)(p, x, True, "sin").sum())(params)
                for r in (None, "full")]  # fmt: skip

    plain, again = jax.jit(run)(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), again, plain)


def test_remat_traces_a_block_no_more_often_than_jax_does():
    seen = []

    @sw.layer
    def block(v, x):
        seen.append(x)
        return L.Dense(4, bias=False)(v, x)

    params, x = {"kernel": np.ones((N, 4, 4), "float32")}, np.ones((2, 4), "float32")
    jax.make_jaxpr(lambda p: L.Scan(block, N, "full")(p, x))(params)
    assert len(seen) == 1

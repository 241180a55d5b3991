"""MixtureOfExperts against a loop over tokens and experts, on one device and on meshes of eight.

Parameters and tokens are arguments of the programs, which are kept: cases of the same shapes share one.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.parallel.topologies import ENVIRONMENT


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def routed(layer, params, x):
    """For each token of x, a list of sequences `(length, features)`: its probabilities, and (expert, weight, taken) by
    choice."""
    kernel = np.asarray(params["router"]["kernel"], np.float64)
    probabilities, choices = [], []
    for sequence in x:
        most = None if layer.capacity is None else np.ceil(layer.capacity * len(sequence) * layer.k / layer.experts)
        p = np.exp(sequence @ kernel)
        p /= p.sum(-1, keepdims=True)
        best = np.argsort(-p, -1, kind="stable")[:, : layer.k]
        used, taken = np.zeros(layer.experts), np.ones(best.shape, bool)
        for j in range(layer.k if most else 0):
            for t in range(len(sequence)):
                taken[t, j] = used[best[t, j]] < most
                used[best[t, j]] += 1
        probabilities.append(p)
        rows = []
        for t in range(len(sequence)):
            total = p[t, best[t]].sum() if layer.normalize else 1
            rows.append([(e, p[t, e] / total, ok) for e, ok in zip(best[t], taken[t], strict=True)])
        choices.append(rows)
    return probabilities, choices


def by_hand(layer, params, x):
    """The output `(sequences, length, features)`."""
    x = np.asarray(x, np.float64)
    kernels = {name: np.asarray(params[name]["kernel"], np.float64) for name in params if name != "router"}
    y = np.zeros_like(x)
    for s, sequence in enumerate(routed(layer, params, x)[1]):
        for t, choices in enumerate(sequence):
            for e, weight, taken in choices:
                h = x[s, t] @ kernels["up"][e]
                if layer.gated:
                    gate = x[s, t] @ kernels["gate"][e]
                    h = gate * sigmoid(gate) * h
                else:
                    h = np.maximum(h, 0)
                y[s, t] += taken * weight * (h @ kernels["down"][e])
    return y


def masks(layer, params, x, there=None):
    """For each token and expert 1 where the expert takes the token, and 1 where the token chose it; and the tokens that
    there are, which are routed as if they were the whole sequence."""
    there = np.ones(x.shape[:2], bool) if there is None else there
    _, choices = routed(layer, params, [row[own] for row, own in zip(np.asarray(x, np.float64), there, strict=True)])
    mask = np.zeros((*x.shape[:2], layer.experts), np.float32)
    chosen = np.zeros_like(mask)
    for s, row in enumerate(choices):
        for t, token in zip(np.flatnonzero(there[s]), row, strict=True):
            for e, _, taken in token:
                mask[s, t, e], chosen[s, t, e] = taken, 1
    return mask, chosen, there


@functools.cache
def dense_program(layer):
    """The layer as it would be without dispatch: every expert on every token, weighed by a mask. Its gradients are
    JAX's own, and its losses plain means."""

    def run(params, x, mask, chosen, there):
        share = there[..., None] / there.sum()
        logits = x @ params["router"]["kernel"]
        p = jax.nn.softmax(logits)
        total = jnp.sum(p * chosen, -1, keepdims=True) + (1 - there[..., None]) if layer.normalize else 1
        h = jnp.einsum("slf,efh->sleh", x, params["up"]["kernel"])
        if layer.gated:
            h = jax.nn.silu(jnp.einsum("slf,efh->sleh", x, params["gate"]["kernel"])) * h
        else:
            h = jax.nn.relu(h)
        y = jnp.einsum("sleh,ehf,sle->slf", h, params["down"]["kernel"], p / total * mask)
        load, mean = jnp.sum(chosen * share, (0, 1)) / layer.k, jnp.sum(p * share, (0, 1))
        z = jnp.sum(jax.nn.logsumexp(logits, -1) ** 2 * share[..., 0])
        return y, {"balance": layer.balance * layer.experts * jnp.sum(load * mean), "z": layer.z * z}

    return with_gradients(run)


def dense(layer, params, x, there=None):
    """What `ours` gives, by `dense_program`."""
    return jax.device_get(dense_program(layer)(params, x, *masks(layer, params, x, there)))


def with_gradients(run):
    """A program for output, losses, and the gradients of all parameters and of x through both."""

    def total(params, x, *rest):
        y, losses = run(params, x, *rest)
        weight = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return jnp.sum(y.astype(jnp.float32) * weight) + sum(losses.values()), (y, losses)

    @jax.jit
    def results(params, x, *rest):
        (_, (y, losses)), (dp, dx) = jax.value_and_grad(total, (0, 1), has_aux=True)(params, x, *rest)
        return {"y": y, "losses": losses, "gradients": dp, "dx": dx}

    return results


@functools.cache
def program(layer, mesh=None):
    place = None if mesh is None else sw.parallel.placement(sw.mesh(mesh))

    def run(params, x, *mask):
        y, updates = sw.pure(layer)(sw.bind(params, train=True, place=place), x, *mask)
        return y, updates.losses

    return with_gradients(run)


def ours(layer, params, x, *mask, mesh=None):
    return jax.device_get(program(layer, mesh)(params, x, *mask))


def assert_same(found, expected, rtol=1e-4, atol=1e-5):
    """Float32 sums in another order: 1e-4 relative, and 1e-5 of the largest number of an array."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol, atol * scale, err_msg=jax.tree_util.keystr(path))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


LAYERS = [
    L.MixtureOfExperts(4, 6, k=2),
    L.MixtureOfExperts(5, 3, k=3, capacity=0.7, normalize=False, balance=0.1, z=0.1),
    slow(L.MixtureOfExperts(4, 6, k=1, gated=False, activation=jax.nn.relu, normalize=False)),
    slow(L.MixtureOfExperts(3, 4, k=3, capacity=0.7)),
    slow(L.MixtureOfExperts(7, 4, k=2, capacity=10.0)),
    slow(L.MixtureOfExperts(1, 4, k=1)),
]


@pytest.mark.costs("routing, dispatch and their gradients: the largest program of one layer")
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_it_is_the_loop_over_tokens(layer, weights, sample):
    x = sample(3, 7, 5)
    params = weights(layer, x)
    found = ours(layer, params, x)
    np.testing.assert_allclose(found["y"], by_hand(layer, params, x), rtol=1e-4, atol=1e-5)
    assert_same(found, dense(layer, params, x))


def favour(params, *experts):
    """Parameters with which every token with a large first feature goes to these experts, most of all to the first."""
    kernel = np.float32(0.01) * np.asarray(params["router"]["kernel"])
    for rank, e in enumerate(experts):
        kernel[0, e] += 6 - rank
    return params | {"router": {"kernel": kernel}}


def positive(x):
    x[..., 0] = 1 + np.abs(x[..., 0])
    return x


MASKED = [
    (None, L.MixtureOfExperts(5, 3, k=3, capacity=0.7, normalize=False, balance=0.1, z=0.1)),
    slow(None, L.MixtureOfExperts(4, 6, k=2)),
    slow("expert=4,data=2", L.MixtureOfExperts(8, 6, k=3, capacity=0.8, balance=0.1)),
    slow("expert=2,tensor=2,fsdp=2", L.MixtureOfExperts(4, 6, k=2, z=0.1)),
    slow("expert=2,sequence=2,data=2", L.MixtureOfExperts(4, 6, k=2, capacity=0.5)),
]


@pytest.mark.costs("the gradient of a mixture")
@pytest.mark.parametrize(("mesh", "layer"), MASKED, ids=str)
def test_tokens_outside_the_mask_might_as_well_not_be_there(mesh, layer, weights, sample):
    """Each sequence is that of its own tokens, wherever they stand; what is not there may be NaN and gets zeros."""
    x, there = sample(8, 6, 5), np.random.default_rng(1).random((8, 6)) < 0.6
    there[1], there[2] = False, True
    params, x = weights(layer, x), np.where(there[..., None], x, np.float32(0))
    expected = dense(layer, params, x, there)
    found = ours(layer, params, np.where(there[..., None], x, np.float32(np.nan)), there, mesh=mesh)
    assert_same(found, expected)
    assert not found["y"][~there].any()
    assert not found["dx"][~there].any()


def test_a_mask_of_rows_and_a_mask_of_all(weights, sample):
    layer, x = L.MixtureOfExperts(4, 6, k=1, capacity=1.0, gated=False), sample(3, 4, 5)
    params, rows = weights(layer, x), np.array([True, False, True])

    @jax.jit
    def run(x, rows):
        y, updates = sw.pure(layer)(sw.bind(params, train=True), x, rows)
        return y, updates.losses, updates.captured

    y, losses, _ = run(x, rows)
    assert losses["balance"] > 0
    assert (np.abs(y).max((1, 2)) > 0).tolist() == rows.tolist()
    for leaf in jax.tree.leaves(run(x, np.zeros(3, bool))):
        assert not leaf.any()
    with pytest.raises(sw.core.errors.InputError, match=r"MixtureOfExperts expects a boolean mask .* mask bool\[4\]"):
        layer(params, x, np.ones(4, bool))


ONE_OR_TWO = [((2, 1), L.MixtureOfExperts(4, 6, k=2)), slow((2,), L.MixtureOfExperts(4, 6, k=1, normalize=False))]


@pytest.mark.costs("the program of the loop over tokens, if it comes first")
@pytest.mark.parametrize(("full", "layer"), ONE_OR_TWO, ids=str)
def test_all_tokens_to_the_same_experts(full, layer, weights, sample):
    x = positive(sample(3, 7, 5))
    params = favour(weights(layer, x), *full)
    found = ours(layer, params, x)
    assert_same(found, dense(layer, params, x))
    for e in range(4):
        assert found["gradients"]["up"]["kernel"][e].any() == (e in full), e


@pytest.mark.costs("two mixtures in one program")
def test_two_dimensions_and_four(weights, sample):
    layer, x = L.MixtureOfExperts(4, 6, k=1, capacity=0.5, gated=False, activation=jax.nn.relu), sample(2, 2, 3, 5)
    params = weights(layer, x)
    run = jax.jit(lambda params, *xs: [layer(params, x) for x in xs])
    four, two = run(params, x, x[0, 0])
    expected = by_hand(layer, params, x.reshape(4, 3, 5))
    np.testing.assert_allclose(four, expected.reshape(x.shape), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two, expected[0], rtol=1e-5, atol=1e-6)


def test_what_it_sows(weights, sample):
    layer, x = L.MixtureOfExperts(4, 6, k=1, capacity=1.0), positive(sample(2, 8, 5))
    params = favour(weights(layer, x), 3)
    _, _, captured = jax.jit(lambda x: sw.apply(layer, params, {}, x, capture="*"))(x)
    np.testing.assert_allclose(captured["load"], [0, 0, 0, 1])
    np.testing.assert_allclose(captured["dropped"], 0.75)


def test_losses_belong_to_training(weights, sample):
    layer, x = L.MixtureOfExperts(4, 6, z=0), sample(2, 8, 5)
    params = weights(layer, x)

    def losses(**how):
        return jax.eval_shape(lambda x: sw.pure(layer)(sw.bind(params, **how), x)[1].losses, x)

    assert losses() == {}
    assert list(losses(train=True)) == ["balance"]


def test_bfloat16_routes_in_float32(weights, sample):
    layer, x = L.MixtureOfExperts(4, 6, k=2), sample(2, 8, 5)
    params = jax.device_get(weights(layer, x))
    rounded = x.astype(jnp.bfloat16).astype("float32")

    @jax.jit
    def run(x, logits):
        y, _, captured = sw.apply(layer, params, {}, x, policy="bfloat16", capture="*")
        return y, captured["load"], L.top_k_routing(logits, 2).load

    y, load, expected = jax.device_get(run(x, rounded @ params["router"]["kernel"]))
    assert y.dtype == jnp.bfloat16
    exact = {name: p if name == "router" else jax.tree.map(lambda k: k.astype(jnp.bfloat16), p) for name, p in
             params.items()}  # fmt: skip
    np.testing.assert_allclose(y.astype("float32"), by_hand(layer, exact, rounded), rtol=0.03, atol=0.03)
    np.testing.assert_array_equal(load, expected)


def test_experts_start_as_layers_of_their_own():
    """The variance of an expert's kernel is that of one expert, and no two experts start alike."""
    params, _ = sw.init(L.MixtureOfExperts(8, 64, gated=False), 0, np.ones((1, 2, 32), "float32"))
    up, down = (np.asarray(params[name]["kernel"]) for name in ("up", "down"))
    np.testing.assert_allclose(up.var((1, 2)), 1 / 32, rtol=0.15)
    np.testing.assert_allclose(down.var((1, 2)), 1 / 64, rtol=0.15)
    assert abs(np.corrcoef(up.reshape(8, -1)) - np.eye(8)).max() < 0.1


MESHES = [
    ("expert=4,data=2", L.MixtureOfExperts(8, 6, k=3, capacity=0.8, balance=0.1)),
    ("expert=2,tensor=2,fsdp=2", L.MixtureOfExperts(4, 6, k=2, z=0.1)),
    slow("expert=8", L.MixtureOfExperts(8, 6, k=2)),  # plain without its gradients: see below, where tokens travel
    slow("expert=4,data=2", L.MixtureOfExperts(4, 6, k=2)),
    slow("expert=8", L.MixtureOfExperts(16, 6, k=1, capacity=1.0, normalize=False)),
    slow("expert=2,tensor=2,fsdp=2", L.MixtureOfExperts(4, 6, k=4, capacity=0.5)),
    slow("expert=2,sequence=2,data=2", L.MixtureOfExperts(4, 6, k=2, capacity=0.5)),
    slow("data=4,tensor=2", L.MixtureOfExperts(5, 6, k=2)),
    slow("expert=4,tensor=2", L.MixtureOfExperts(4, 6, k=2, gated=False, activation=jax.nn.relu)),
]


@pytest.mark.costs("the gradient of a mixture on a mesh of eight: the largest program of one layer")
@pytest.mark.parametrize(("mesh", "layer"), MESHES, ids=str)
def test_a_mesh_has_the_numbers_of_one_device(mesh, layer, weights, sample):
    x = sample(8, 6, 5)
    params = weights(layer, x)
    many = ours(layer, params, x, mesh=mesh)
    assert_same(many, dense(layer, params, x))
    np.testing.assert_allclose(many["y"], by_hand(layer, params, x), rtol=1e-4, atol=1e-5)


FULL = [
    ("expert=2,tensor=2,fsdp=2", L.MixtureOfExperts(4, 6, k=2, z=0.1), (2, 3)),  # both on the second device
    slow("expert=4,data=2", L.MixtureOfExperts(8, 6, k=1, normalize=False), (5, 4)),  # both on the third
    slow("expert=4,data=2", L.MixtureOfExperts(8, 6, k=2, normalize=False), (5, 4)),
]


@pytest.mark.costs("the program of a mesh with the numbers of one device, if it comes first")
@pytest.mark.parametrize(("mesh", "layer", "experts"), FULL, ids=str)
def test_on_a_mesh_no_token_is_lost_even_if_all_go_to_one_device(mesh, layer, experts, weights, sample):
    x = positive(sample(8, 6, 5))
    params = favour(weights(layer, x), *experts)
    many = ours(layer, params, x, mesh=mesh)
    assert_same(many, dense(layer, params, x))
    assert np.abs(many["y"]).min(-1).max() > 0


@pytest.mark.costs("the gradient of a mixture on a mesh of eight")
def test_a_batch_that_does_not_divide_is_computed_by_all(weights, sample):
    layer, x = L.MixtureOfExperts(8, 6, k=2), sample(3, 6, 5)
    params = weights(layer, x)
    with pytest.warns(sw.parallel.ShardingWarning, match="does not divide"):
        many = ours(layer, params, x, mesh="expert=8")
    assert_same(many, dense(layer, params, x))


@pytest.mark.costs("a mixture on a mesh of eight")
def test_on_a_mesh_tokens_travel_and_kernels_do_not(weights, sample):
    """Two all-to-alls of tokens and one of counts; nothing of the batch or of the experts is gathered."""
    layer, x = L.MixtureOfExperts(8, 16, k=2), sample(8, 6, 5)
    params, mesh = weights(layer, x), sw.mesh("expert=8")
    place = sw.parallel.placement(mesh)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
    whole = sw.parallel.replicated(mesh)
    held = {name: {"kernel": whole if name == "router" else rows} for name in params}

    def run(params, x):
        return sw.pure(layer)(sw.bind(params, train=True, place=place), x)[0]

    compiled = jax.jit(run, in_shardings=(held, rows), out_shardings=rows).lower(params, x).compile()
    text = compiled.as_text()
    assert text.count(" all-to-all(") == 3
    assert " all-gather(" not in text
    y = compiled(jax.device_put(params, held), jax.device_put(x, rows))
    np.testing.assert_allclose(y, by_hand(layer, params, x), rtol=1e-4, atol=1e-5)


def test_experts_that_the_axis_does_not_divide(weights, sample):
    layer, x = L.MixtureOfExperts(6, 4), sample(8, 2, 4)
    params, place = {"moe": weights(layer, x)}, sw.parallel.placement(sw.mesh("expert=4,data=2"))
    said = r"moe: 6 experts do not divide over the 4 devices of mesh axis expert; expert=3 works with 6 experts, and 8"
    with pytest.raises(sw.ConfigError, match=said):
        jax.eval_shape(lambda x: sw.apply(lambda v, x: layer(v.moe, x), params, {}, x, place=place), x)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 5}, "MixtureOfExperts: k must be an integer from 1 to the 4 experts, got 5"),
        ({"k": 0}, "k must be an integer from 1 to the 4 experts, got 0"),
        ({"experts": 0}, "experts must be an integer above 0, got 0"),
        ({"hidden": 2.5}, "hidden must be an integer above 0, got 2.5"),
        ({"capacity": 0}, "capacity must be above 0, got 0; 1.0 is a fair share for each expert, None drops no token"),
        ({"capacity": -1.0}, "capacity must be above 0, got -1.0"),
        ({"capacity": "all"}, "capacity must be above 0, got 'all'"),
        ({"balance": -1}, r"balance must be a number from 0 up, got -1"),
    ],
)
def test_hyper_parameters_that_cannot_be(options, said):
    with pytest.raises(sw.ConfigError, match=said):
        L.MixtureOfExperts(**{"experts": 4, "hidden": 6, **options})


def test_one_dimension_is_too_few():
    with pytest.raises(sw.core.errors.InputError, match=r"MixtureOfExperts expects \(..., length, features\)"):
        L.MixtureOfExperts(4, 6)({}, np.ones(5, "float32"))


AHEAD = """
import json, re
from collections import Counter
import jax, sapwood as sw
from sapwood import layers as L
from sapwood.parallel.topologies import topology

layer, shape = L.MixtureOfExperts(8, 256, k=2), (16, 128, 256)
mesh = sw.mesh("expert=4,data=2,tensor=2", devices=topology("v5e:4x4"))
place = sw.parallel.placement(mesh)
x = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=place(("batch", "length", "embed"), shape))
spec = sw.spec(layer, x).params
shardings = sw.parallel.param_shardings(spec, mesh)
params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), spec, shardings)

def loss(params, x):
    y, updates = sw.pure(layer)(sw.bind(params, train=True, place=place, policy="bfloat16"), x)
    return y.astype("float32").sum() + sum(jax.tree.leaves(updates.losses))

step = jax.jit(jax.grad(loss, (0, 1)), out_shardings=(shardings, x.sharding)).lower(params, x).compile()
text = step.as_text()
kinds = "all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
found = Counter(re.findall(rf" ({kinds})(?:-start)?\\(", text))
found["kernels"] = text.count('custom_call_target="tpu_custom_call"')
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.fresh_compile  # as it is for a TPU
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='libtpu is not installed: pip install "sapwood[plan]"'
)
def test_the_program_of_a_tpu():
    """Tokens there and back, both passes: four ragged all-to-alls, counts beside them, and no gather; nine kernels."""
    done = subprocess.run(
        [sys.executable, "-c", AHEAD], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("ragged-all-to-all") == 4
    assert found.pop("kernels") == 9
    assert found.pop("all-to-all") <= 3  # of counts
    assert found.pop("all-reduce") <= 6  # partial sums over tensor, gradients, losses
    assert not found


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_a_batch_of_nothing_gives_nothing(capacity, weights):
    layer, x = L.MixtureOfExperts(4, 3, capacity=capacity), np.zeros((0, 5, 8), "float32")

    @jax.jit
    def run(params, x):
        y, pull = jax.vjp(layer, params, x)
        return y, pull(y), sw.pure(layer)(sw.bind(params, train=True), x)[1].losses

    y, *others = jax.device_get(run(weights(layer, x), x))
    assert y.shape == x.shape
    assert all(not leaf.any() for leaf in jax.tree.leaves(others))

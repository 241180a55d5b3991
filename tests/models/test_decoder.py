"""`Decoder` against the same network written by hand, what its options do, and how it lies on a mesh."""

import functools

import jax
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.models import Decoder
from sapwood.train import next_token

TOKENS = np.arange(10).reshape(2, 5) % 7
OPTIONS = [{}, {"gated": False, "bias": True}, {"kv_heads": 1, "mlp": 12}, {"experts": 3, "k": 2, "mlp": 12}]


def weights(model, size=0.5):
    """Random parameters for it, biases too, without compiling an initialiser."""
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda p: draw(scale=size, size=p.shape).astype("float32"), sw.spec(model, TOKENS).params)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def norm(p, x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"]


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def turned(x):
    """Pairs of features, one of each half, as complex numbers: the rotation is a product."""
    first, second = np.split(x, 2, -1)
    angles = np.multiply.outer(np.arange(x.shape[1]), 10000.0 ** -np.linspace(0, 1, first.shape[-1], endpoint=False))
    z = (first + 1j * second) * np.exp(1j * angles)[:, None]
    return np.concatenate([z.real, z.imag], -1)


def attended(p, x):
    q, k, v = (np.einsum("ble,ehd->blhd", x, p[name]["kernel"]) for name in ("query", "key", "value"))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", turned(q), turned(k)) / np.sqrt(q.shape[-1])
    seen = softmax(np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf))
    return np.einsum("bhqk,bkhd,hde->bqe", seen, v, p["out"]["kernel"])


def mixed(p, x, k, most):
    """Every expert on every token, weighed by the k largest probabilities; and the losses `balance` and `z`.

    `most`: an expert takes the first so many of a sequence's tokens that chose it. For k = 1 alone: with more choices
    their order counts, too.
    """
    logits = dense(p["router"], x)
    chances = softmax(logits)
    chosen = chances >= np.sort(chances, -1)[..., -k, None]
    assert most is None or k == 1
    taken = chosen if most is None else chosen & (np.cumsum(chosen, 1) <= most)
    weights = chances * taken / (chances * chosen).sum(-1, keepdims=True)
    gate, up = (np.einsum("ble,xeh->blxh", x, p[name]["kernel"]) for name in ("gate", "up"))
    y = np.einsum("blxh,xhe->blxe", silu(gate) * up, p["down"]["kernel"])
    balance = chances.shape[-1] * np.sum(chosen.mean((0, 1)) / k * chances.mean((0, 1)))
    z = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    return np.einsum("blx,blxe->ble", weights, y), {"balance": 0.01 * balance, "z": 0.001 * z}


def by_hand(model, p, tokens, most=None):
    """The formulas, block by block, in NumPy: the logits, and the losses of all blocks."""
    x, losses = p["embed"]["table"][tokens], []
    for i in range(model.depth):
        b = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        x = x + attended(b["attention"], norm(b["norm1"], x))
        h = norm(b["norm2"], x)
        if model.experts is not None:
            y, loss = mixed(b["experts"], h, model.k, most)
            x, losses = x + y, [*losses, loss]
            continue
        h = silu(dense(b["gate"], h)) * dense(b["up"], h) if model.gated else gelu(dense(b["up"], h))
        x = x + dense(b["down"], h)
    return dense(p["logits"], norm(p["norm"], x)), losses


@pytest.mark.costs("a whole decoder twice, once by its halves; with a mixture that takes over two seconds to compile")
@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_network_of_its_formulas(options):
    model = Decoder(vocabulary=7, depth=2, width=8, heads=2, **options)
    params = weights(model)

    @jax.jit
    def run(params):
        return model(params, TOKENS), L.dense(model.features(params, TOKENS), *model.head(params))

    expected, _ = by_hand(model, params, TOKENS)
    whole, halves = run(params)
    np.testing.assert_allclose(whole, expected, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(halves, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.costs("two programs: the gradient of a whole decoder with dropout, with and without remat")
@pytest.mark.parametrize("remat", ["full", pytest.param("minimal", marks=pytest.mark.slow)])
def test_remat_changes_no_number_and_saves_less(remat):
    plain, saving = (Decoder(7, 2, 8, 2, dropout=0.5, remat=policy) for policy in (None, remat))
    params = weights(plain)

    def gradient(model):
        loss = lambda params: sw.apply(model, params, {}, TOKENS, rng=1, train=True)[0].sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    for ours, theirs in zip(*map(jax.tree.leaves, map(gradient, (saving, plain))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)

    def residuals(model):
        run = lambda params: jax.vjp(lambda params: sw.apply(model, params, {}, TOKENS)[0], params)[1]  # noqa: E731
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(run, params)))

    assert residuals(saving) < residuals(plain)


@pytest.mark.costs("the gradient of a decoder with a mixture in each block, the largest program of this file")
def test_the_losses_of_all_mixtures_are_added_up():
    """Scanned, with remat, as by hand; and their gradient reaches the routers of all blocks."""
    model = Decoder(7, 3, 8, 2, mlp=12, experts=4, k=1, capacity=1.5, remat="full")
    params = weights(model)
    router = params["blocks"]["experts"]["router"]

    def total(router):
        blocks = params["blocks"] | {"experts": params["blocks"]["experts"] | {"router": router}}
        logits, updates = sw.pure(model)(sw.bind(params | {"blocks": blocks}, rng=0, train=True), TOKENS)
        losses = updates.losses["blocks"]["experts"]
        return losses["balance"] + losses["z"], (logits, losses)

    gradient, (logits, losses) = jax.device_get(jax.jit(jax.grad(total, has_aux=True))(router))
    expected, all_losses = by_hand(model, params, TOKENS, most=2)  # of 5 tokens, 1.5 times the share of 4 experts
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-5)
    for name, value in losses.items():
        np.testing.assert_allclose(value, sum(loss[name] for loss in all_losses), rtol=1e-5)
    assert losses.keys() == {"balance", "z"}
    assert (np.abs(gradient["kernel"]).max((1, 2)) > 0).all()


@pytest.mark.slow
def test_padding_packed_sequences_and_rows_that_do_not_count():
    """Each sequence as by itself; the mixtures' losses are of real tokens in rows that count; what else is there may be
    any number."""
    model = Decoder(7, 2, 8, 2, mlp=12, experts=3, k=2)
    params, (a, b) = weights(model), (TOKENS[:1, :3], TOKENS[1:, :4])
    tokens, targets = (np.full((2, 9), value) for value in (-5, 99))
    tokens[0, 1:8], targets[0, 1:8] = np.concatenate([a[0], b[0]]), np.arange(7)
    of = np.array([[0, 1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2, 2, 0, 0]])
    batch = {"tokens": tokens, "targets": targets, "of": of, "weight": np.float32([1, 0])}
    objective = next_token(model, segments="of")

    @jax.jit
    def run(params, batch):
        def total(params):
            (loss, _), updates = sw.pure(objective)(sw.bind(params, rng=0, train=True), batch)
            return loss + sum(jax.tree.leaves(updates.losses)), (loss, updates.losses)

        return jax.value_and_grad(total, has_aux=True)(params)

    (_, (loss, losses)), slopes = run(params, batch)
    (one, of_one), (two, of_two) = (by_hand(model, params, x) for x in (a, b))
    chances = softmax(np.concatenate([one[0], two[0]]))
    np.testing.assert_allclose(loss, -np.log(chances[np.arange(7), np.arange(7)]).mean(), rtol=1e-5)
    z = sum((3 * x["z"] + 4 * y["z"]) / 7 for x, y in zip(of_one, of_two, strict=True))
    np.testing.assert_allclose(losses["blocks"]["experts"]["z"], z, rtol=1e-5)

    tokens[1], targets[1], tokens[0, 0], targets[0, 8] = np.arange(9) % 7, 3, 6, -1
    jax.tree.map(np.testing.assert_array_equal, run(params, batch), ((_, (loss, losses)), slopes))
    assert jax.eval_shape(lambda: objective.predict(sw.bind(params), batch)).shape == (2, 9, 7)


def test_segments_are_for_models_that_take_them():
    class Model:
        def features(self, v, tokens): ...

        def head(self, v): ...

    with pytest.raises(sw.ConfigError, match=r"segments='of'\): Model.features.* takes no segments= and mask="):
        next_token(Model(), segments="of")


@pytest.mark.slow
def test_a_mask_goes_through_a_pipeline():
    """Micro-batches carry their rows of it, and the mixtures inside send their tokens over the mesh."""
    model = Decoder(7, 2, 8, 2, mlp=12, experts=4, k=1, capacity=1.0)
    params, tokens = weights(model), np.arange(64).reshape(8, 8) % 7
    mask = np.arange(8) < np.array([[8], [3], [5], [0], [1], [7], [8], [2]])
    place = sw.parallel.placement(sw.mesh("stage=2,expert=2,data=2"))
    run = jax.jit(lambda place, mask: model(sw.bind(params, place=place), tokens, mask=mask), static_argnums=0)
    expected = run(None, mask)
    np.testing.assert_allclose(np.where(mask[..., None], run(place, mask) - expected, 0), 0, atol=1e-4)
    short = jax.jit(lambda x: model(params, x))(tokens[1:2, :3])
    np.testing.assert_allclose(expected[1:2, :3], short, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def on_one_device():
    """A model with kernels large enough to be split, its parameters, tokens, and the logits of one device."""
    model, tokens = Decoder(64, 2, 128, 4), np.arange(64).reshape(8, 8)
    params = weights(model, 0.1)
    return model, params, tokens, np.asarray(jax.jit(model)(params, tokens))


@pytest.mark.costs("a decoder on one device, and on a mesh")
@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", "fsdp=2,tensor=4"])
def test_on_a_mesh_every_kernel_is_split_and_the_numbers_are_the_same(mesh, on_one_device):
    (model, params, tokens, expected), mesh = on_one_device, sw.mesh(mesh)
    spread = jax.device_put(params, sw.parallel.param_shardings(sw.spec(model, tokens).params, mesh))
    for path, leaf in jax.tree_util.tree_leaves_with_path(spread["blocks"]):
        split = leaf.size // leaf.addressable_shards[0].data.size
        assert split == (1 if "norm" in str(path) else mesh.size // mesh.shape.get("data", 1)), path
    run = jax.jit(lambda params: sw.apply(model, params, {}, tokens, place=sw.parallel.placement(mesh))[0])
    np.testing.assert_allclose(run(spread), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_on_a_mesh_it_is_born_split_and_with_the_same_numbers(on_one_device):
    (model, _, tokens, _), mesh = on_one_device, sw.mesh("data=2,fsdp=4")
    born, _ = sw.parallel.init(model, 0, tokens, mesh=mesh)
    planned = sw.parallel.param_shardings(sw.spec(model, tokens).params, mesh)
    jax.tree.map(lambda leaf, sharding: np.testing.assert_equal(leaf.sharding, sharding), born, planned)
    alike = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)  # the last bit is each program's
    jax.tree.map(alike, born, sw.init(model, 0, tokens)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth"),
        ({"mlp": -1}, "mlp"),
        ({"dropout": 1.5}, "dropout"),
        ({"remat": "fully"}, "'fully' is no remat policy; did you mean 'full'"),
        ({"experts": 0}, "experts must be"),
        ({"experts": 4, "k": 5}, "k must be an integer from 1 to the 4 experts, got 5"),
        ({"experts": 4, "capacity": 0}, "capacity must be above 0, got 0"),
        ({"k": 1}, "k=1 and capacity=None are of a mixture; give experts, too"),
        ({"capacity": 1.5}, "k=2 and capacity=1.5 are of a mixture"),
    ],
)
def test_sizes_that_cannot_be(options, message):
    with pytest.raises(sw.ConfigError, match=message):
        Decoder(**{"vocabulary": 7, "depth": 1, "width": 8, "heads": 2, **options})


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), ()])
def test_tokens_that_are_no_batch_of_sequences(shape):
    with pytest.raises(sw.InputError, match=r"Decoder expects \(batch, length\), got int32\[.*\] of rank"):
        sw.spec(Decoder(7, 1, 8, 2), jax.ShapeDtypeStruct(shape, "int32"))

"""`Decoder` against the same network written by hand, what its options do, and how it lies on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw
from sapwood import layers as L
from sapwood.models import Decoder

TOKENS = jnp.arange(10).reshape(2, 5) % 7
OPTIONS = [{}, {"gated": False, "bias": True}, {"kv_heads": 1, "mlp": 12}, {"experts": 3, "k": 2, "mlp": 12}]


def by_hand(model, p, tokens):
    """The formulas, block by block, in NumPy but for the rotation and the attention."""
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731

    def norm(p, x):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"]

    def dense(p, x):
        return x @ p["kernel"] + p.get("bias", 0)

    def mixed(p, x):
        q, k, v = (np.einsum("ble,ehd->blhd", x, p[name]["kernel"]) for name in ("query", "key", "value"))
        y = L.attention(L.rotary(jnp.asarray(q)), L.rotary(jnp.asarray(k)), jnp.asarray(v), causal=True)
        return np.einsum("blhd,hde->ble", y, p["out"]["kernel"])

    x = p["embed"]["table"][tokens]
    for i in range(model.depth):
        b = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        x = x + mixed(b["attention"], norm(b["norm1"], x))
        h = norm(b["norm2"], x)
        if model.experts is not None:
            x = x + np.asarray(L.MixtureOfExperts(model.experts, model.mlp, model.k)(b["experts"], jnp.asarray(h)))
            continue
        h = silu(dense(b["gate"], h)) * dense(b["up"], h) if model.gated else np.asarray(jax.nn.gelu(dense(b["up"], h)))
        x = x + dense(b["down"], h)
    return dense(p["logits"], norm(p["norm"], x))


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_network_of_its_formulas(options):
    model = Decoder(vocabulary=7, depth=2, width=8, heads=2, **options)
    params, _ = sw.init(model, 0, TOKENS)
    params = jax.tree.map(lambda a: a + 0.1 * jnp.sin(jnp.arange(a.size)).reshape(a.shape), params)  # biases too
    expected = by_hand(model, jax.tree.map(np.asarray, params), np.asarray(TOKENS))
    np.testing.assert_allclose(jax.jit(model)(params, TOKENS), expected, rtol=2e-4, atol=2e-5)
    kernel, bias = model.head(params)
    halves = L.dense(jax.jit(model.features)(params, TOKENS), kernel, bias)
    np.testing.assert_allclose(halves, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("remat", ["full", pytest.param("minimal", marks=pytest.mark.slow)])
def test_remat_changes_no_number_and_saves_less(remat):
    plain, saving = (Decoder(7, 2, 8, 2, dropout=0.5, remat=policy) for policy in (None, remat))
    params, _ = sw.init(plain, 0, TOKENS)

    def gradient(model):
        loss = lambda params: sw.apply(model, params, {}, TOKENS, rng=1, train=True)[0].sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    for ours, theirs in zip(*map(jax.tree.leaves, map(gradient, (saving, plain))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)

    def residuals(model):
        run = lambda params: jax.vjp(lambda params: sw.apply(model, params, {}, TOKENS)[0], params)[1]  # noqa: E731
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(run, params)))

    assert residuals(saving) < residuals(plain)


def test_the_losses_of_all_mixtures_are_added_up():
    """Scanned, with remat, as unrolled; and their gradient reaches the routers of all blocks."""
    model = Decoder(7, 3, 8, 2, mlp=12, experts=4, k=1, capacity=1.5, remat="full")
    params, _ = sw.init(model, 0, TOKENS)

    def total(params):
        _, updates = sw.pure(model)(sw.bind(params, rng=0, train=True), TOKENS)
        losses = updates.losses["blocks"]["experts"]
        return losses["balance"] + losses["z"], losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(params)
    x, expected = params["embed"]["table"][TOKENS], {"balance": 0.0, "z": 0.0}
    block = jax.jit(lambda params, x: sw.pure(model._block)(sw.bind(params, rng=0, train=True), x))
    for i in range(model.depth):
        x, updates = block(jax.tree.map(lambda a, i=i: a[i], params["blocks"]), x)
        expected = {name: value + updates.losses["experts"][name] for name, value in expected.items()}
    for name, value in expected.items():
        np.testing.assert_allclose(losses[name], value, rtol=1e-5)
    router = gradient["blocks"]["experts"]["router"]["kernel"]
    assert (jnp.abs(router).max((1, 2)) > 0).all()


@pytest.mark.parametrize("mesh", ["data=2,fsdp=4", "fsdp=2,tensor=4"])
def test_on_a_mesh_every_kernel_is_split_and_the_numbers_are_the_same(mesh):
    model, tokens = Decoder(64, 2, 128, 4), jnp.arange(64).reshape(8, 8)
    mesh = sw.mesh(mesh)
    params, _ = sw.init(model, 0, tokens)
    spread, _ = sw.parallel.init(model, 0, tokens, mesh=mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(spread["blocks"]):
        split = leaf.size // leaf.addressable_shards[0].data.size
        assert split == (1 if "norm" in str(path) else mesh.size // mesh.shape.get("data", 1)), path
    run = jax.jit(lambda params: sw.apply(model, params, {}, tokens, place=sw.parallel.placement(mesh))[0])
    np.testing.assert_allclose(run(spread), jax.jit(model)(params, tokens), rtol=1e-4, atol=1e-5)


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

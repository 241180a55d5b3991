"""Haiku: `hk.transform_with_state`, one jitted and donated step with optax."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from benchmarks.job import jax_loop


def train(work, model, optimizer, params):
    network = hk.transform_with_state(model)

    def step(carry, x, y):
        params, state, opt_state = carry

        def loss(params):
            logits, new = network.apply(params, state, None, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), value

    first, state = jax.jit(network.init)(jax.random.key(0), work.pairs()[0][0])
    wrong = jax.tree.map(lambda a, b: a.shape == b.shape, dict(first), params)
    assert all(jax.tree.leaves(wrong)), wrong
    params = jax.device_put(params)
    return jax_loop(jax.jit(step, donate_argnums=0), (params, state, optimizer.init(params)), work.pairs())


def linear(weights):
    """The parameters of a dense layer or a convolution under Haiku's names."""
    return {{"kernel": "w", "bias": "b"}[name]: value for name, value in weights.items()}


def norm(weights):
    return {"scale": weights["scale"], "offset": weights["bias"]}


def batched(norm):
    """The parameters of a norm in the shape of Haiku's batch norm, `(1, 1, 1, features)`."""
    return {name: value[None, None, None] for name, value in norm.items()}


def mlp(work):
    def model(x):
        x = jax.nn.relu(hk.Linear(work.config["hidden"], name="hidden")(x))
        return hk.Linear(work.config["classes"], name="out")(x)

    params = {name: linear(weights) for name, weights in work.weights.items()}
    return train(work, model, optax.adam(work.config["rate"]), params)


def conv(work):
    c = work.config

    def convolve(name, features, size=3, stride=1):
        padding = [(size // 2, size // 2)] * 2
        return hk.Conv2D(features, size, stride, padding=padding, with_bias=False, name=name)

    def batch_norm(name, x):
        norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9, eps=1e-5, name=name)
        return norm(x, is_training=True)

    def model(x):
        x = jax.nn.relu(batch_norm("stem_norm", convolve("stem", c["stages"][0])(x)))
        for i in range(len(c["stages"]) * c["blocks"]):
            features = c["stages"][i // c["blocks"]]
            stride = 1 if features == x.shape[-1] else 2
            h = jax.nn.relu(batch_norm(f"block{i}_norm1", convolve(f"block{i}_conv1", features, stride=stride)(x)))
            h = batch_norm(f"block{i}_norm2", convolve(f"block{i}_conv2", features)(h))
            if stride == 2:
                x = batch_norm(f"block{i}_project_norm", convolve(f"block{i}_project", features, 1, 2)(x))
            x = jax.nn.relu(x + h)
        return hk.Linear(c["classes"], name="head")(x.mean((1, 2)))

    params = {name: value for name, value in work.weights.items() if name != "blocks"}
    for i, block in work.weights["blocks"].items():
        params |= {f"block{i}_{name}": value for name, value in block.items()}
    params = {name: batched(norm(value)) if "norm" in name else linear(value) for name, value in params.items()}
    return train(work, model, optax.sgd(c["rate"], momentum=0.9), params)


def gpt(work):
    c, weights = work.config, work.weights

    def layer_norm(name):
        return hk.LayerNorm(-1, create_scale=True, create_offset=True, eps=1e-6, name=name)

    def model(tokens):
        mask = jnp.tril(jnp.ones((1, 1, c["tokens"], c["tokens"]), bool))
        x = hk.Embed(c["vocabulary"], c["width"], name="embed")(tokens)
        x = x + hk.get_parameter("positions", (c["tokens"], c["width"]), init=jnp.zeros)
        for i in range(c["layers"]):
            h = layer_norm(f"block{i}_norm1")(x)
            attention = hk.MultiHeadAttention(
                c["heads"], c["width"] // c["heads"], model_size=c["width"], with_bias=False,
                w_init=hk.initializers.VarianceScaling(), name=f"block{i}_attention",
            )  # fmt: skip
            x = x + attention(h, h, h, mask)
            h = jax.nn.gelu(hk.Linear(4 * c["width"], name=f"block{i}_up")(layer_norm(f"block{i}_norm2")(x)))
            x = x + hk.Linear(c["width"], name=f"block{i}_down")(h)
        return hk.Linear(c["vocabulary"], with_bias=False, name="head")(layer_norm("norm")(x))

    params = {
        "~": {"positions": weights["positions"]["table"]},
        "embed": {"embeddings": weights["embed"]["table"]},
        "norm": norm(weights["norm"]),
        "head": linear(weights["head"]),
    }
    for i, block in weights["blocks"].items():
        at = {name: value["kernel"].reshape(c["width"], c["width"]) for name, value in block["attention"].items()}
        params |= {f"block{i}_attention/{'linear' if name == 'out' else name}": {"w": w} for name, w in at.items()}
        params |= {f"block{i}_{name}": norm(block[name]) for name in ("norm1", "norm2")}
        params |= {f"block{i}_{name}": linear(block[name]) for name in ("up", "down")}
    return train(work, model, optax.adam(c["rate"]), params)

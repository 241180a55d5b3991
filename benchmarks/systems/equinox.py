"""Equinox: modules as pytrees, `eqx.filter_jit` with optax; examples are mapped with `jax.vmap`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.job import jax_loop


def train(work, model, optimizer, logits, state=None):
    """The job of a model. ``logits(model, state, x) -> (logits, state)`` computes a whole batch."""

    def step(carry, x, y):
        model, state, opt_state = carry

        def loss(model):
            z, new = logits(model, state, x)
            return optax.softmax_cross_entropy_with_integer_labels(z, y).mean(), new

        (value, state), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        updates, opt_state = optimizer.update(gradient, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return (eqx.apply_updates(model, updates), state, opt_state), value

    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    return jax_loop(eqx.filter_jit(step, donate="all"), (model, state, opt_state), work.pairs())


def linear(weights):
    """An `eqx.nn.Linear` from a kernel of shape `(inputs, outputs)`."""
    kernel = weights["kernel"]
    layer = eqx.nn.Linear(*kernel.shape, use_bias="bias" in weights, key=jax.random.key(0))
    layer = eqx.tree_at(lambda m: m.weight, layer, jnp.asarray(kernel.T))
    return eqx.tree_at(lambda m: m.bias, layer, jnp.asarray(weights["bias"])) if "bias" in weights else layer


def affine(layer, weights):
    """The norm ``layer`` with the given scale and bias."""
    return eqx.tree_at(
        lambda m: (m.weight, m.bias), layer, (jnp.asarray(weights["scale"]), jnp.asarray(weights["bias"]))
    )


class MLP(eqx.Module):
    hidden: eqx.nn.Linear
    out: eqx.nn.Linear

    def __call__(self, x):
        return self.out(jax.nn.relu(self.hidden(x)))


def mlp(work):
    model = MLP(linear(work.weights["hidden"]), linear(work.weights["out"]))
    return train(work, model, optax.adam(work.config["rate"]), lambda model, state, x: (jax.vmap(model)(x), state))


def convolve(weights, stride=1):
    """An `eqx.nn.Conv2d`, channels first, from a kernel of shape `(height, width, inputs, outputs)`."""
    kernel = np.transpose(weights["kernel"], (3, 2, 0, 1))
    outputs, inputs, size, _ = kernel.shape
    layer = eqx.nn.Conv2d(inputs, outputs, size, stride, size // 2, use_bias=False, key=jax.random.key(0))
    return eqx.tree_at(lambda m: m.weight, layer, jnp.asarray(kernel))


def batch_norm(weights):
    layer = eqx.nn.BatchNorm(len(weights["scale"]), "batch", eps=1e-5, momentum=0.9, mode="batch")
    return affine(layer, weights)


class Residual(eqx.Module):
    conv1: eqx.nn.Conv2d
    norm1: eqx.nn.BatchNorm
    conv2: eqx.nn.Conv2d
    norm2: eqx.nn.BatchNorm
    project: eqx.nn.Conv2d | None
    project_norm: eqx.nn.BatchNorm | None

    def __init__(self, p):
        stride = 2 if "project" in p else 1
        self.conv1, self.norm1 = convolve(p["conv1"], stride), batch_norm(p["norm1"])
        self.conv2, self.norm2 = convolve(p["conv2"]), batch_norm(p["norm2"])
        self.project = convolve(p["project"], 2) if stride == 2 else None
        self.project_norm = batch_norm(p["project_norm"]) if stride == 2 else None

    def __call__(self, x, state):
        h, state = self.norm1(self.conv1(x), state)
        h, state = self.norm2(self.conv2(jax.nn.relu(h)), state)
        if self.project is not None and self.project_norm is not None:
            x, state = self.project_norm(self.project(x), state)
        return jax.nn.relu(x + h), state


class ResNet(eqx.Module):
    stem: eqx.nn.Conv2d
    stem_norm: eqx.nn.BatchNorm
    blocks: list
    head: eqx.nn.Linear

    def __init__(self, p):
        self.stem, self.stem_norm = convolve(p["stem"]), batch_norm(p["stem_norm"])
        self.blocks = [Residual(block) for block in p["blocks"].values()]
        self.head = linear(p["head"])

    def __call__(self, x, state):
        x, state = self.stem_norm(self.stem(jnp.moveaxis(x, -1, 0)), state)
        x = jax.nn.relu(x)
        for block in self.blocks:
            x, state = block(x, state)
        return self.head(x.mean((1, 2))), state


def conv(work):
    model, state = eqx.nn.make_with_state(ResNet)(work.weights)

    def logits(model, state, x):
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    return train(work, model, optax.sgd(work.config["rate"], momentum=0.9), logits, state)


def layer_norm(weights):
    return affine(eqx.nn.LayerNorm(len(weights["scale"]), eps=1e-6), weights)


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, p, heads):
        at = {name: value["kernel"] for name, value in p["attention"].items()}
        width = len(at["query"])
        projections = [at[name].reshape(width, width).T for name in ("query", "key", "value", "out")]
        attention = eqx.nn.MultiheadAttention(heads, width, key=jax.random.key(0))
        self.attention = eqx.tree_at(
            lambda m: [m.query_proj.weight, m.key_proj.weight, m.value_proj.weight, m.output_proj.weight],
            attention, [jnp.asarray(kernel) for kernel in projections],
        )  # fmt: skip
        self.norm1, self.norm2 = layer_norm(p["norm1"]), layer_norm(p["norm2"])
        self.up, self.down = linear(p["up"]), linear(p["down"])

    def __call__(self, x, mask):
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h, mask)
        return x + jax.vmap(lambda x: self.down(jax.nn.gelu(self.up(self.norm2(x)))))(x)


class GPT(eqx.Module):
    embed: eqx.nn.Embedding
    positions: jax.Array
    blocks: list
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, p, heads):
        self.embed = eqx.nn.Embedding(weight=jnp.asarray(p["embed"]["table"]))
        self.positions = jnp.asarray(p["positions"]["table"])
        self.blocks = [Block(block, heads) for block in p["blocks"].values()]
        self.norm, self.head = layer_norm(p["norm"]), linear(p["head"])

    def __call__(self, tokens):
        mask = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
        x = jax.vmap(self.embed)(tokens) + self.positions
        for block in self.blocks:
            x = block(x, mask)
        return jax.vmap(lambda x: self.head(self.norm(x)))(x)


def gpt(work):
    model = GPT(work.weights, work.config["heads"])
    return train(work, model, optax.adam(work.config["rate"]), lambda model, state, x: (jax.vmap(model)(x), state))

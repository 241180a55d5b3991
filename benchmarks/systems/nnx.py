"""Flax NNX: modules that hold their arrays, `nnx.Optimizer`, `nnx.jit` with `nnx.cached_partial`.

Flax's performance guide recommends `cached_partial` for loops: it caches the traversal of the modules between steps.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.job import Loop


def train(work, model, optimizer):
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    step = nnx.cached_partial(step, model, optimizer)
    return Loop(step, [jax.device_put(batch) for batch in work.pairs()], jax.block_until_ready)


def fill(module, weights, **renamed):
    """Set a module's parameters from the canonical tree. ``renamed`` maps names of the tree to other attributes."""
    for name, value in weights.items():
        target = getattr(module, renamed.get(name, name))
        if isinstance(value, dict):
            fill(target, value, **renamed)
        else:
            assert target.shape == value.shape, (name, target.shape, value.shape)
            target.set_value(jnp.asarray(value))


class MLP(nnx.Module):
    def __init__(self, c, rngs):
        self.hidden = nnx.Linear(c["inputs"], c["hidden"], rngs=rngs)
        self.out = nnx.Linear(c["hidden"], c["classes"], rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def mlp(work):
    model = MLP(work.config, nnx.Rngs(0))
    fill(model, work.weights)
    return train(work, model, optax.adam(work.config["rate"]))


def convolve(inputs, features, rngs, size=3, stride=1):
    return nnx.Conv(inputs, features, (size, size), stride, padding=size // 2, use_bias=False, rngs=rngs)


def batch_norm(features, rngs):
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)


class Residual(nnx.Module):
    def __init__(self, inputs, features, rngs):
        stride = 1 if inputs == features else 2
        self.conv1, self.norm1 = convolve(inputs, features, rngs, stride=stride), batch_norm(features, rngs)
        self.conv2, self.norm2 = convolve(features, features, rngs), batch_norm(features, rngs)
        self.halves = stride == 2
        if self.halves:
            self.project, self.project_norm = convolve(inputs, features, rngs, 1, 2), batch_norm(features, rngs)

    def __call__(self, x):
        h = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu(h + (self.project_norm(self.project(x)) if self.halves else x))


class ResNet(nnx.Module):
    def __init__(self, c, rngs):
        widths = [width for width in c["stages"] for _ in range(c["blocks"])]
        self.stem, self.stem_norm = convolve(3, widths[0], rngs), batch_norm(widths[0], rngs)
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.blocks = nnx.List([Residual(inputs, features, rngs) for inputs, features in pairs])
        self.head = nnx.Linear(widths[-1], c["classes"], rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def conv(work):
    model = ResNet(work.config, nnx.Rngs(0))
    _fill_with_blocks(model, work.weights)
    return train(work, model, optax.sgd(work.config["rate"], momentum=0.9))


def _fill_with_blocks(model, weights):
    fill(model, {name: value for name, value in weights.items() if name != "blocks"}, table="embedding")
    for i, block in weights["blocks"].items():
        fill(model.blocks[int(i)], block)


class Block(nnx.Module):
    def __init__(self, c, rngs):
        width = c["width"]
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(c["heads"], width, use_bias=False, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    def __init__(self, c, rngs):
        self.embed = nnx.Embed(c["vocabulary"], c["width"], rngs=rngs)
        self.positions = nnx.Embed(c["tokens"], c["width"], rngs=rngs)
        self.blocks = nnx.List([Block(c, rngs) for _ in range(c["layers"])])
        self.norm = nnx.LayerNorm(c["width"], rngs=rngs)
        self.head = nnx.Linear(c["width"], c["vocabulary"], use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x, mask = self.embed(tokens) + self.positions.embedding, nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def gpt(work):
    model = GPT(work.config, nnx.Rngs(0))
    _fill_with_blocks(model, work.weights)
    return train(work, model, optax.adam(work.config["rate"]))

"""Flax linen: compact modules, `TrainState`, one jitted and donated step."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from benchmarks.job import jax_loop


def loss_of(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(work, model, optimizer, params):
    _check(jax.eval_shape(model.init, jax.random.key(0), work.pairs()[0][0]), params)

    def step(state, x, y):
        def loss(params):
            return loss_of(state.apply_fn({"params": params}, x), y)

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    state = TrainState.create(apply_fn=model.apply, params=jax.device_put(params), tx=optimizer)
    return jax_loop(jax.jit(step, donate_argnums=0), state, work.pairs())


def _check(first, params):
    """Assert that the given parameters have the names and shapes of those that the model itself initializes."""
    wrong = jax.tree.map(lambda a, b: a.shape == b.shape, first["params"], params)
    assert all(jax.tree.leaves(wrong)), wrong


class MLP(nn.Module):
    hidden: int
    classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes, name="out")(nn.relu(nn.Dense(self.hidden, name="hidden")(x)))


def mlp(work):
    model = MLP(work.config["hidden"], work.config["classes"])
    return train(work, model, optax.adam(work.config["rate"]), work.weights)


class Residual(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        def conv(name, size=3, stride=1):
            return nn.Conv(self.features, (size, size), stride, padding=size // 2, use_bias=False, name=name)

        def norm(name):
            return nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, name=name)

        h = nn.relu(norm("norm1")(conv("conv1", stride=self.stride)(x)))
        h = norm("norm2")(conv("conv2")(h))
        if self.stride == 2:
            x = norm("project_norm")(conv("project", 1, 2)(x))
        return nn.relu(x + h)


class ResNet(nn.Module):
    stages: tuple
    blocks: int
    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.stages[0], (3, 3), padding=1, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5, name="stem_norm")(x))
        for i in range(len(self.stages) * self.blocks):
            features = self.stages[i // self.blocks]
            x = Residual(features, 1 if features == x.shape[-1] else 2, name=f"blocks_{i}")(x)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


class StatefulTrainState(TrainState):
    batch_stats: dict


def conv(work):
    c = work.config
    model = ResNet(c["stages"], c["blocks"], c["classes"])

    def step(state, x, y):
        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = state.apply_fn(variables, x, mutable=["batch_stats"])
            return loss_of(logits, y), new["batch_stats"]

        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradient, batch_stats=new), value

    params = _flat_blocks(work.weights)
    first = jax.jit(model.init)(jax.random.key(0), work.pairs()[0][0])
    _check(first, params)
    state = StatefulTrainState.create(
        apply_fn=model.apply, params=jax.device_put(params), tx=optax.sgd(c["rate"], momentum=0.9),
        batch_stats=first["batch_stats"],
    )  # fmt: skip
    return jax_loop(jax.jit(step, donate_argnums=0), state, work.pairs())


def _flat_blocks(weights):
    """The canonical tree with `blocks/3` renamed to `blocks_3`."""
    params = {name: value for name, value in weights.items() if name != "blocks"}
    return params | {f"blocks_{i}": block for i, block in weights["blocks"].items()}


class Block(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(name="norm1")(x)
        attention = nn.MultiHeadDotProductAttention(self.heads, use_bias=False, name="attention")
        x = x + attention(h, mask=nn.make_causal_mask(x[..., 0]))
        h = nn.gelu(nn.Dense(4 * self.width, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(self.width, name="down")(h), None


class GPT(nn.Module):
    layers: int
    width: int
    heads: int
    tokens: int
    vocabulary: int
    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width, name="embed")(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.02), (self.tokens, self.width))
        if self.scanned:
            scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
            x, _ = scan(self.width, self.heads, name="blocks")(x, None)
        else:
            for i in range(self.layers):
                x, _ = Block(self.width, self.heads, name=f"blocks_{i}")(x)
        return nn.Dense(self.vocabulary, use_bias=False, name="head")(nn.LayerNorm(name="norm")(x))


def gpt(work):
    c, weights = work.config, work.weights
    scanned = "scan" in work.system
    model = GPT(c["layers"], c["width"], c["heads"], c["tokens"], c["vocabulary"], scanned)
    params = _flat_blocks(weights) | {
        "embed": {"embedding": weights["embed"]["table"]}, "positions": weights["positions"]["table"]
    }  # fmt: skip
    if scanned:
        blocks = [params.pop(f"blocks_{i}") for i in range(c["layers"])]
        params["blocks"] = jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)
    return train(work, model, optax.adam(c["rate"]), params)

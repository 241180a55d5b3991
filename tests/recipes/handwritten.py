"""The recipes `digits` and `digits-mlp` as anyone would write them in plain JAX: the floor they are held to."""

import jax
import jax.numpy as jnp
import optax
from jax import lax


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp_loss(params, state, key, batch):
    x = (batch["image"].astype(jnp.float32) / 16).reshape(len(batch["image"]), -1)
    x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return cross_entropy(x @ params["logits"]["kernel"] + params["logits"]["bias"], batch["label"]), state


def conv_loss(params, state, key, batch, dropout=0.5):
    x, after = batch["image"].astype(jnp.float32) / 16, {}
    for i in "01":
        block = params["blocks"][i]
        x = lax.conv_general_dilated(
            x, block["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x, norm = batch_norm(x, block["norm"], state["blocks"][i]["norm"])
        after[i] = {"norm": norm}
        x = max_pool(jax.nn.relu(x))
    x = x.reshape(len(x), -1)
    kept = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 - dropout, x.shape)  # 1: this dropout and no other
    x = jnp.where(kept, x / (1 - dropout), 0)
    return cross_entropy(x @ params["logits"]["kernel"] + params["logits"]["bias"], batch["label"]), {"blocks": after}


@jax.custom_jvp
def moments(x):
    mean = x.mean((0, 1, 2), keepdims=True)
    return mean, jnp.square(x - mean).mean((0, 1, 2), keepdims=True)


@moments.defjvp
def moments_jvp(primals, tangents):  # d var / d mean is 0, which the chain rule would add up
    (x,), (dx,) = primals, tangents
    mean, var = moments(x)
    return (mean, var), (dx.mean((0, 1, 2), keepdims=True), 2 * ((x - mean) * dx).mean((0, 1, 2), keepdims=True))


@jax.custom_jvp
def standardise(x, mean, gain, shift):
    return (x - mean) * gain + shift


@standardise.defjvp
def standardise_jvp(primals, tangents):  # what is small is gathered first
    (x, mean, gain, _), (dx, dmean, dgain, dshift) = primals, tangents
    return standardise(*primals), gain * dx + (x - mean) * dgain + (dshift - gain * dmean)


def batch_norm(x, params, state, momentum=0.9, eps=1e-5):
    mean, var = moments(x)
    moved = {"mean": mean.reshape(-1), "var": var.reshape(-1)}
    after = {name: state[name] + (1 - momentum) * (now - state[name]) for name, now in moved.items()}
    return standardise(x, mean, lax.rsqrt(var + eps) * params["scale"], params["bias"]), after


def max_pool(x):
    for axis in (2, 1):  # as fast as XLA does it on a CPU: see layers/spatial/pooling.py
        a, b = (lax.slice_in_dim(x, i, i + x.shape[axis] // 2 * 2 - 1, 2, axis) for i in (0, 1))
        x = jnp.where((b > a) | jnp.isnan(b), b, a)
    return x


def train_step(loss, optimizer, state, batch):
    """The usual step: gradient, update, count."""
    params, model_state, opt_state, key, step = state
    key_now = jax.random.fold_in(key, step)
    (value, model_state), grads = jax.value_and_grad(loss, has_aux=True)(params, model_state, key_now, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), model_state, opt_state, key, step + 1), value

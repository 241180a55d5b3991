"""The floor: each training step written by hand in plain JAX and optax, under one `jax.jit`.

Norms compute the variance in one pass, as the mean of squares minus the square of the mean, as the peers do.
"""

import jax
import jax.numpy as jnp
import optax

from benchmarks.job import jax_loop


def train(work, loss, optimizer, state=None):
    """The job of a loss ``(params, x, y) -> loss``, or with a state ``(params, state, x, y) -> (loss, state)``."""

    def plain(carry, x, y):
        params, opt_state = carry
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def stateful(carry, x, y):
        params, opt_state, state = carry
        (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params, state, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), value

    params = jax.device_put(work.weights)
    carry = (params, optimizer.init(params))
    if state is None:
        return jax_loop(jax.jit(plain, donate_argnums=0), carry, work.pairs())
    return jax_loop(jax.jit(stateful, donate_argnums=0), (*carry, jax.device_put(state)), work.pairs())


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype("float32"), labels).mean()


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def mlp(work):
    def loss(params, x, y):
        return cross_entropy(dense(params["out"], jax.nn.relu(dense(params["hidden"], x))), y)

    return train(work, loss, optax.adam(work.config["rate"]))


def conv(work):
    def loss(params, state, x, y):
        new = {}

        def convolve(p, x, stride=1):
            pad = p["kernel"].shape[0] // 2
            return jax.lax.conv_general_dilated(
                x, p["kernel"], (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        def norm(p, name, x):
            mean = x.mean((0, 1, 2))
            var = jnp.square(x).mean((0, 1, 2)) - jnp.square(mean)
            old = state[name]
            new[name] = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}
            return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]

        x = jax.nn.relu(norm(params["stem_norm"], "stem_norm", convolve(params["stem"], x)))
        for i, p in params["blocks"].items():
            stride = 2 if "project" in p else 1
            h = jax.nn.relu(norm(p["norm1"], f"{i}/norm1", convolve(p["conv1"], x, stride)))
            h = norm(p["norm2"], f"{i}/norm2", convolve(p["conv2"], h))
            if "project" in p:
                x = norm(p["project_norm"], f"{i}/project_norm", convolve(p["project"], x, stride))
            x = jax.nn.relu(x + h)
        return cross_entropy(dense(params["head"], x.mean((1, 2))), y), new

    norms = {"stem_norm": work.weights["stem_norm"]}
    for i, p in work.weights["blocks"].items():
        norms |= {f"{i}/{name}": p[name] for name in ("norm1", "norm2", "project_norm") if name in p}
    state = {name: {"mean": jnp.zeros_like(p["scale"]), "var": jnp.ones_like(p["scale"])} for name, p in norms.items()}
    return train(work, loss, optax.sgd(work.config["rate"], momentum=0.9), state)


def layer_norm(p, x):
    wide = x.astype("float32")
    mean = wide.mean(-1, keepdims=True)
    var = jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean)
    return ((wide - mean) * jax.lax.rsqrt(var + 1e-6) * p["scale"] + p["bias"]).astype(x.dtype)


def block(p, x, kernel=None):
    h, at = layer_norm(p["norm1"], x), p["attention"]
    q, k, v = (jnp.einsum("ble,ehd->blhd", h, at[name]["kernel"]) for name in ("query", "key", "value"))
    h = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kernel)
    x = x + jnp.einsum("blhd,hde->ble", h, at["out"]["kernel"])
    return x + dense(p["down"], jax.nn.gelu(dense(p["up"], layer_norm(p["norm2"], x))))


def gpt(work):
    """The blocks unrolled, or for "floor-scan" one `lax.scan` over their stacked weights.

    In bfloat16 weights are stored in float32 and cast where they are used, except those of norms. On a GPU attention is
    then cuDNN's.
    """
    scanned = "scan" in work.system
    compute = work.config.get("compute", "float32")
    kernel = "cudnn" if compute != "float32" and jax.default_backend() == "gpu" else None

    def cast(path, weight):
        return weight if any("norm" in str(name) for name in path) else weight.astype(compute)

    def loss(params, tokens, targets):
        params = jax.tree.map_with_path(cast, params)
        x = params["embed"]["table"][tokens] + params["positions"]["table"]
        if scanned:
            x, _ = jax.lax.scan(lambda x, p: (block(p, x, kernel), None), x, params["blocks"])
        else:
            for i in range(len(params["blocks"])):
                x = block(params["blocks"][str(i)], x, kernel)
        return cross_entropy(layer_norm(params["norm"], x) @ params["head"]["kernel"], targets)

    if scanned:
        blocks = [work.weights["blocks"][str(i)] for i in range(work.config["layers"])]
        work.weights["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return train(work, loss, optax.adam(work.config["rate"]))

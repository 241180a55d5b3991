"""One model, any mesh: forward, gradient, batch statistics and update agree with a single device.

This is about the functions of `parallel` by themselves; `test_matrix.py` has the Trainer, some of it in a plain run.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import parallel
from sapwood.parallel import DEFAULT, TABLES, mesh

INIT, ZEROS, ONES = jax.nn.initializers.normal(0.1), jax.nn.initializers.zeros, jax.nn.initializers.ones


def batch_norm(v, x):
    """Over all but the last dimension, with running statistics; written out, to test layouts and not a layer."""
    mean, var = v.state("mean", x.shape[-1:], ZEROS), v.state("var", x.shape[-1:], ONES)
    if v.train:
        axes = tuple(range(x.ndim - 1))
        batch_mean, batch_var = x.mean(axes), x.var(axes)
        v.put(mean=0.9 * mean + 0.1 * batch_mean, var=0.9 * var + 0.1 * batch_var)
        mean, var = batch_mean, batch_var
    scale = v.param("scale", x.shape[-1:], ONES, axes=("channels_out",))
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + v.param("bias", x.shape[-1:], ZEROS)


def dense(v, x, features, axes=None):
    return x @ v.param("kernel", (x.shape[-1], features), INIT, axes=axes) + v.param("bias", (features,), ZEROS)


def model(v, image):
    """A convolution with all its names, batch norm, and three dense layers, of which one has no names."""
    names = ("height", "width", "channels_in", "channels_out")
    kernel = v.conv.param("kernel", (3, 3, image.shape[-1], 16), INIT, axes=names)
    x = jax.lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = v.shard(jax.nn.relu(batch_norm(v.norm, x)), "batch", "height", "width", "channels_out")
    x = dense(v.hidden, x.reshape(len(x), -1), 32)
    x = v.shard(jnp.tanh(dense(v.up, x, 64, ("embed", "mlp"))), "batch", "mlp")
    return dense(v.down, x, 8, ("mlp", "embed"))


OPTIMIZERS = {"adam": optax.adam(1e-2), "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8)}
BATCH = {
    "image": np.random.RandomState(0).randn(16, 8, 8, 4).astype("f"),
    "label": np.random.RandomState(1).randint(0, 8, 16),
}
RULES = replace(DEFAULT, min_size=16)  # these models are small: let them be sharded all the same


def train_step(model, optimizer, place=None):
    def loss_fn(params, state, batch):
        logits, state = sw.apply(model, params, state, batch["image"], train=True, place=place)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, (state, logits)

    def step(params, state, opt_state, batch):
        (loss, (state, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return {
            "params": optax.apply_updates(params, updates), "state": state, "opt": opt_state,
            "loss": loss, "logits": logits, "grads": grads,
        }  # fmt: skip

    return step


@pytest.fixture(scope="session")
def variables():
    return jax.device_get(sw.init(model, 0, BATCH["image"]))


@pytest.fixture(scope="session")
def single(variables):
    """The results on one device, by the optimizer's name."""

    @functools.cache
    def on_one_device(name):
        step = train_step(model, OPTIMIZERS[name])
        run = jax.jit(lambda params, state, batch: step(params, state, OPTIMIZERS[name].init(params), batch))
        return jax.device_get(run(*variables, BATCH))

    return on_one_device


def on_mesh(optimizer, m, rules, variables):
    spec = sw.spec(model, BATCH["image"])
    shardings = parallel.param_shardings(spec.params, m, rules)
    states = parallel.state_shardings(spec.state, m)
    opts = parallel.opt_shardings(optimizer, spec.params, shardings, m)
    params, state = jax.device_put(variables, (shardings, states))
    opt_state = jax.jit(optimizer.init, out_shardings=opts)(params)
    out = {
        "params": shardings, "state": states, "opt": opts, "grads": shardings,
        "loss": parallel.replicated(m), "logits": parallel.batch_sharding(m, rules),
    }  # fmt: skip
    step = jax.jit(train_step(model, optimizer, parallel.placement(m, rules)), out_shardings=out)
    return step(params, state, opt_state, parallel.put_batch(BATCH, parallel.batch_sharding(m, rules)))


def slow(*layout):
    return pytest.param(*layout, marks=pytest.mark.slow)


def long(*layout):
    """What the matrix of `test_matrix.py` has in CI, too."""
    return pytest.param(*layout, marks=pytest.mark.long)


LAYOUTS = [
    slow("data=2,fsdp=2,tensor=2", RULES, "adafactor"),
    slow("data=4,fsdp=2", RULES, "adam"),
    long("data=8", RULES, "adam"),
    long("fsdp=8", RULES, "adafactor"),
    long("replica=2,fsdp=4", RULES, "adam"),
    slow("tensor=8", RULES, "adam"),
    long("data=4,fsdp=2", replace(TABLES["data"], min_size=16), "adam"),
    slow("data=4,tensor=2", replace(TABLES["tensor"], min_size=16), "adafactor"),
]


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        tolerance = 2e-3 if path[0].key in ("params", "opt") else 2e-5  # Adam divides a gradient by its own size
        np.testing.assert_allclose(a, b, tolerance, 1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("text", "rules", "optimizer"), LAYOUTS)
def test_every_layout_has_the_numbers_of_one_device(text, rules, optimizer, single, variables):
    found = jax.device_get(on_mesh(OPTIMIZERS[optimizer], mesh(text), rules, variables))
    assert_same(found, single(optimizer))
    assert np.abs(found["grads"]["conv"]["kernel"]).max() > 1e-4


def test_the_layouts_do_differ():
    """The test above would pass if nothing were ever sharded."""
    spec = sw.spec(model, BATCH["image"]).params
    found = {
        text: [s.spec for s in jax.tree.leaves(parallel.param_shardings(spec, mesh(text), RULES))]
        for text in ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2")
    }
    assert len({str(specs) for specs in found.values()}) == 4
    lost = [axis for specs in found.values() for spec in specs for axis in spec if axis is not None]
    assert set(lost) == {"fsdp", "tensor"}


@pytest.mark.slow
def test_an_explicit_mesh_of_the_user_has_the_same_numbers(single, variables):
    explicit = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    assert_same(on_mesh(OPTIMIZERS["adam"], explicit, RULES, variables), single("adam"))

"""`JAX_TRANSFER_GUARD=disallow`: Sapwood moves nothing between host and device but what it says it moves."""

import jax
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import layers as L

X, Y = np.random.RandomState(0).rand(20, 3).astype("float32"), np.arange(20) % 2


def model(v, features):
    x = L.Dropout(0.5)(v.drop, L.BatchNorm()(v.norm, features))
    v.check(x.sum() < 1e9, "large")
    return L.Dense(2)(v.logits, x)


@pytest.fixture
def guard():
    """For all threads, as the environment variable does; the context manager is for one."""
    jax.config.update("jax_transfer_guard", "disallow")
    yield
    jax.config.update("jax_transfer_guard", None)


@pytest.mark.slow
def test_nothing_is_moved_in_silence(guard, tmp_path):
    data = sw.data.load((X, Y))
    trainer = sw.Trainer(sw.supervised(model, inputs="features"), optax.sgd(0.01))
    options = {"batch_size": 20, "progress": False, "run": tmp_path / "run", "checkpoint_every": 1}
    trainer.fit(data, steps=1, validation=data, **options)
    state = trainer.fit(data, steps=2, validation=data, resume=True, **options).state
    assert trainer.predict(state, data).shape == (20, 2)
    path = sw.save(tmp_path / "model", state.params, state.state)
    for loaded in (sw.load(path), sw.load(tmp_path / "run")):
        kernels = jax.device_get((loaded.params["logits"]["kernel"], state.params["logits"]["kernel"]))
        np.testing.assert_array_equal(*kernels)
    meshed = sw.Trainer(
        trainer.objective, trainer.optimizer, mesh=sw.parallel.mesh("data=2", devices=jax.devices()[:2])
    )
    meshed.init(0, sw.data.batches(data, 20)[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        jax.numpy.add(X, 1)  # the guard is up

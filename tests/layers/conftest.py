"""How a layer is held against its oracle: one call compares the values and every gradient."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapwood as sw

sys.path.append(str(Path(__file__).parent))  # for `attention_formula`; at the end, so that it shadows no package


def _values_and_gradients(f, args):
    """`f(*args)` and the gradient of a fixed, uneven weighting of it by every floating argument."""
    chosen = [i for i, a in enumerate(args) if jnp.issubdtype(jnp.result_type(a), jnp.floating)]

    def weighted(*some):
        full = list(args)
        for i, a in zip(chosen, some, strict=True):
            full[i] = a
        y = f(*full)
        return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    gradients, y = jax.grad(weighted, tuple(range(len(chosen))), has_aux=True)(*(args[i] for i in chosen))
    return y, gradients


@pytest.fixture(scope="session")
def agree():
    """`agree(ours, oracle, *args)`: the same values and the same gradient by each floating argument, in one program.

    Not for a mesh: XLA:CPU does not order independent collectives alike on all devices, and hangs.
    """

    def check(ours, oracle, *args, rtol=1e-4, atol=1e-5):
        mine, theirs = jax.jit(lambda *args: [_values_and_gradients(f, args) for f in (ours, oracle)])(*args)
        mine, theirs = jax.device_get((mine, theirs))
        assert mine[0].shape == theirs[0].shape
        assert mine[0].dtype == theirs[0].dtype
        np.testing.assert_allclose(mine[0], theirs[0], rtol=rtol, atol=atol)
        for i, (a, b) in enumerate(zip(mine[1], theirs[1], strict=True)):
            scale = float(np.abs(b).max())
            assert scale > 0, f"the gradient of argument {i} says nothing"
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * max(1, scale), err_msg=f"gradient of argument {i}")

    return check


@pytest.fixture
def sample(request):
    """`sample(2, 3)`: normal numbers of that shape in NumPy, others at every call, the same in every run of a test."""
    numbers = np.random.default_rng(sum(map(ord, request.node.name)))

    def sample(*shape, dtype="float32"):
        return numbers.normal(size=shape).astype(jnp.dtype(dtype))

    return sample


@pytest.fixture
def draw(sample):
    """`draw(2, 3)`: what `sample` gives, as an array of JAX."""
    return lambda *shape, dtype="float32": jnp.asarray(sample(*shape, dtype=dtype))


@pytest.fixture
def weights(sample):
    """`weights(layer, *xs)`: small random params for it, without compiling an initialiser."""

    def weights(layer, *xs):
        return jax.tree.map(lambda p: jnp.asarray(0.5 * sample(*p.shape)), sw.spec(layer, *xs).params)

    return weights


@pytest.fixture(scope="session")
def keras():
    """Keras on its JAX backend, the oracle that shares no code with the layers above XLA."""
    return pytest.importorskip("keras")

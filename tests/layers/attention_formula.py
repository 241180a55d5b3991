"""Attention as its formula has it, worked out pair by pair in float64, and how another way is compared with it."""

import jax
import numpy as np


def formula(q, k, v, dy, causal=False, segments=None, scale=None, mask=np.True_):
    """softmax(q k^T * scale) v over what each query may see, every pair worked out in float64, and its gradients.

    A query that may see nothing has the mean of all values, and no gradient.
    """
    q, k, v, dy = (np.asarray(x, "float64").swapaxes(1, 2) for x in (q, k, v, dy))
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (np.repeat(x, groups, axis=1) for x in (k, v))
    seen = mask & (np.tri(q.shape[2], k.shape[2], dtype=bool) if causal else np.True_)
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])[:, None]
    scores = np.where(seen, q @ k.mT * scale, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    slopes = dy @ v.mT
    slopes = np.where(seen, weights * (slopes - (slopes * weights).sum(-1, keepdims=True)) * scale, 0)
    dk, dv = (x.reshape(len(x), -1, groups, *x.shape[2:]).sum(2) for x in (slopes.mT @ q, weights.mT @ dy))
    return tuple(x.swapaxes(1, 2) for x in (weights @ v, slopes @ k, dk, dv))


def with_gradients(f):
    """`(q, k, v, dy, *others)` to the output of `f(q, k, v, *others)` and the gradients of q, k and v."""

    @jax.jit
    def run(q, k, v, dy, *others):
        y, pull = jax.vjp(lambda q, k, v: f(q, k, v, *others), q, k, v)
        return y, *pull(dy.astype(y.dtype))

    return run


def uneven(q):
    """A gradient of the output that tells all places apart."""
    return np.cos(np.arange(q.size, dtype="float32")).reshape(q.shape)


def agree(ours, theirs, dtype="float32", rtol=2e-5, atol=5e-6, why=""):
    """The same output and gradients, each of which says something."""
    for name, mine, right in zip(("y", "dq", "dk", "dv"), jax.device_get(ours), theirs, strict=True):
        most = np.abs(right).max()
        assert (mine.shape, mine.dtype) == (right.shape, dtype), f"{name} {why}"
        assert most > 0, f"{name} says nothing {why}"
        scale = 1 if name == "y" else max(1, most)
        np.testing.assert_allclose(mine.astype("float64"), right, rtol=rtol, atol=atol * scale, err_msg=f"{name} {why}")

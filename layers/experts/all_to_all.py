"""Expert all-to-all: rows are sent to the device that holds their expert, and the results are sent back.

`send` and `bring_back` run inside a `jax.shard_map` over the mesh axis of the experts. Each is the gradient of the
other. TPUs and GPUs send only the rows that exist, by `lax.ragged_all_to_all`. CPUs lack it and send whole buffers, and
so do experts that are spread over several mesh axes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

Axis = tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def send(platform: str, axis: Axis, width: int, rows: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
    """Send rows, sorted by device, to their devices; return what this device receives.

    Args:
        platform: the platform of the devices.
        axis: names of the mesh axes that the experts are spread over.
        width: rows of the buffer for each sender. No device may send more rows than this to another.
        rows: `(n, features)`, sorted by the device they go to.
        sent: `(devices,)`, the number of rows that go to each device.
        received: `(devices,)`, the number of rows that come from each device.

    Returns:
        `(devices * width, features)`: the rows from device d begin at row `d * width`; the rest is zeros.
    """
    run = _send_padded if platform == "cpu" or len(axis) > 1 else _send_ragged
    return run(axis, width, rows, sent, received)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def bring_back(platform: str, axis: Axis, n: int, buffer: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
    """Return rows to the devices that sent them, the inverse of `send` with the same sizes.

    `buffer` has the layout that `send` returns. The result has `n` rows in the order that `send` took them.
    """
    run = _bring_padded if platform == "cpu" or len(axis) > 1 else _bring_ragged
    return run(axis, n, buffer, sent, received)


def _send_forward(platform, axis, width, rows, sent, received):
    return send(platform, axis, width, rows, sent, received), (rows.shape[0], sent, received)


def _send_backward(platform, axis, width, kept, d):
    n, sent, received = kept
    return bring_back(platform, axis, n, d, sent, received), None, None


def _bring_forward(platform, axis, n, buffer, sent, received):
    return bring_back(platform, axis, n, buffer, sent, received), (buffer.shape[0] // len(sent), sent, received)


def _bring_backward(platform, axis, n, kept, d):
    width, sent, received = kept
    return send(platform, axis, width, d, sent, received), None, None


send.defvjp(_send_forward, _send_backward)
bring_back.defvjp(_bring_forward, _bring_backward)


def _starts(sizes: jax.Array) -> jax.Array:
    return jnp.cumsum(sizes) - sizes


def swap(axis: Axis, x: jax.Array) -> jax.Array:
    """Send `x[d]` to device d: `(devices, ...)` indexed by receiver to the same indexed by sender."""
    return lax.all_to_all(x, axis, 0, 0, tiled=True)


def _send_padded(axis, width, rows, sent, received):
    column = jnp.arange(width)[None]
    index = jnp.where(column < sent[:, None], _starts(sent)[:, None] + column, rows.shape[0])
    return swap(axis, rows.at[index].get(mode="fill", fill_value=0)).reshape(len(sent) * width, *rows.shape[1:])


def _bring_padded(axis, n, buffer, sent, received):
    devices = len(sent)
    width = buffer.shape[0] // devices
    got = swap(axis, buffer.reshape(devices, width, *buffer.shape[1:])).reshape(buffer.shape)
    row = jnp.arange(n)
    device = jnp.minimum(jnp.searchsorted(jnp.cumsum(sent), row, side="right"), devices - 1)
    index = jnp.where(row < jnp.sum(sent), device * width + row - _starts(sent)[device], buffer.shape[0])
    return got.at[index].get(mode="fill", fill_value=0)


def _send_ragged(axis, width, rows, sent, received):
    into = jnp.zeros((len(sent) * width, *rows.shape[1:]), rows.dtype)
    there = jnp.full_like(sent, lax.axis_index(axis) * width)
    return lax.ragged_all_to_all(rows, into, _starts(sent), sent, there, received, axis_name=axis[0])


def _bring_ragged(axis, n, buffer, sent, received):
    width = buffer.shape[0] // len(sent)
    into = jnp.zeros((n, *buffer.shape[1:]), buffer.dtype)
    here = jnp.arange(len(sent), dtype=sent.dtype) * width
    there = swap(axis, _starts(sent))  # where each device keeps the rows that it sent here
    return lax.ragged_all_to_all(buffer, into, here, received, there, sent, axis_name=axis[0])

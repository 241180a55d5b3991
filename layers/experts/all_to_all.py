"""The expert all-to-all: rows go to the device that holds their expert, and their results come back.

Both directions work inside a `jax.shard_map` over the mesh axis of the experts, and each is the other's gradient. A TPU
or GPU sends the rows there are, by `ragged_all_to_all`; a CPU has no such thing and sends whole buffers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

Axis = tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def send(platform: str, axis: Axis, width: int, rows: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
    """Rows `(n, features)`, sorted by device, to what this device gets: `(devices * width, features)`.

    `sent` and `received` `(devices,)` say how many rows go to each device and come from each. What device d sent begins
    at row `d * width`; the rest is zeros. No device may send more than `width` rows to another.
    """
    run = _send_padded if platform == "cpu" or len(axis) > 1 else _send_ragged
    return run(axis, width, rows, sent, received)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def bring_back(platform: str, axis: Axis, n: int, buffer: jax.Array, sent: jax.Array, received: jax.Array) -> jax.Array:
    """The way back of `send`: a buffer as it gives to n rows in the order it took, with the same sizes."""
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
    """`x[d]` of every device to device d."""
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

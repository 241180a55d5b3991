"""The feed of batches to the devices: a thread reads batches ahead and places them under their sharding.

One read may fetch several batches, in two ways. A "block" is several batches stacked into one array, for a program
that does several steps. A "run" is several single batches that are read together because each takes only microseconds.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.batching import Batches
from sapwood.parallel.batches import check_batch_size

LONGEST = 16
"""Most batches in a run."""
QUICK = 2e-3
"""Seconds: a run that is read faster makes the next one twice as long, since waking a thread for less is overhead."""


class DeviceBatches(Iterator[dict[str, Any]]):
    """An iterator of batches as global `jax.Array`s. Made by `to_device`.

    `position` counts the batches that were handed out, not those read ahead, so it is right for a checkpoint.

    Attributes:
        batches: the stream of host batches that it reads.
        sharding: the sharding of a batch; None is JAX's default device.
    """

    def __init__(
        self, batches: Batches, sharding: Any, prefetch: int, block: int | Callable[[int], int] | None, host: bool
    ):
        self.batches, self.sharding = batches, sharding
        self._block, self._prefetch, self._host = block, prefetch, host
        self._ahead: deque[Future] = deque()
        self._ready: deque[Any] = deque()
        self._run = 1
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sapwood-feed") if prefetch else None
        self._next = batches.position

    @property
    def position(self) -> int:
        """The number of the next batch that will be handed out."""
        return self.batches.position

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    @property
    def steps(self) -> int | None:
        return self.batches.steps

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint; see `Batches.state`."""
        return self.batches.state()

    def seek(self, position: int) -> "DeviceBatches":
        """Make batch `position` the next one. Batches that were read ahead are dropped."""
        self.batches.seek(position)
        self._forget()
        return self

    def restore(self, state: Mapping[str, Any]) -> "DeviceBatches":
        """Seek to the position at which `state()` was taken; see `Batches.restore`."""
        self.batches.restore(state)
        self._forget()
        return self

    def _forget(self) -> None:
        """Drop what was read ahead, and continue from the position."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._ready.clear()
        self._next = self.batches.position

    def _size(self, step: int) -> int:
        """The number of batches in the block that starts at `step`: `block`, or fewer at the end of the stream."""
        size = self._block(step) if callable(self._block) else self._block or 1
        return size if self.steps is None else min(size, self.steps - step)

    def __next__(self) -> dict[str, Any]:
        step = self.batches.position
        size = self._size(step)
        if size <= 0:
            raise StopIteration
        try:
            if not self._ready:
                self._ready.extend(self._read_ahead() if self._pool is not None else self._read(step, size, 1))
            if isinstance(batch := self._ready.popleft(), Exception):
                raise batch
        except BaseException:
            self._forget()  # the next call then reads the same batch again
            raise
        self.batches.position = step + size
        return batch

    def _read_ahead(self) -> list[Any]:
        """Submit reads until more than `prefetch` are pending, and return the result of the oldest."""
        assert self._pool is not None
        while len(self._ahead) <= self._prefetch and (size := self._size(self._next)) > 0:
            run = self._length(self._next) if self._host and size == 1 else 1
            self._ahead.append(self._pool.submit(self._read, self._next, size, run))
            self._next += size * run
        return self._ahead.popleft().result()

    def _length(self, step: int) -> int:
        """The length of the run that starts at `step`: it ends before the next block."""
        return next((n for n in range(1, self._run) if self._size(step + n) != 1), self._run)

    def _read(self, step: int, size: int, run: int) -> list[Any]:
        """Read a block of batches, or a run of single ones, and place them on the devices.

        If a batch of a run raises an error, the error takes its place in the list, and `__next__` raises it there.
        """
        if self._block is not None and not (callable(self._block) and size == 1):
            return [_place(self.batches.block(step, size), self.batches, self.sharding, 1, self._host)]
        begun = time.perf_counter()
        try:
            block = self.batches.block(step, run)
        except Exception as error:
            if run == 1:
                return [error]
            self._run = 1
            return [self._read(step + i, 1, 1)[0] for i in range(run)]
        self._run = min(2 * run, LONGEST) if time.perf_counter() - begun < QUICK else max(run // 2, 1)
        each = [{name: values[i] for name, values in block.items()} for i in range(run)]
        return [_place(batch, self.batches, self.sharding, 0, self._host) for batch in each]

    def close(self) -> None:
        """Stop reading ahead."""
        self._forget()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def __del__(self) -> None:
        if (pool := getattr(self, "_pool", None)) is not None and not sys.is_finalizing():
            pool.shutdown(wait=False, cancel_futures=True)


def to_device(
    batches: Batches,
    sharding: Any = None,
    *,
    prefetch: int = 2,
    block: int | Callable[[int], int] | None = None,
    host: bool = False,
) -> DeviceBatches:
    """Feed batches to the devices as global arrays; a thread reads and transfers them ahead.

    Each process reads only the rows that its own devices hold under the sharding. Transfers are asynchronous, so the
    feed never waits for a device.

    Args:
        batches: a stream, as `sapwood.data.batches` returns. The feed continues from its position, and does not change
            it.
        sharding: the sharding of a batch, such as `sapwood.parallel.batch_sharding(mesh)`: dimension 0 over the data
            axes. None puts everything on JAX's default device.
        prefetch: batches to read ahead; 0 reads each when it is requested, in the caller's thread.
        block: the number of batches to hand out at once as arrays `(block, batch, ...)`, for several steps in one
            dispatch; the last block may have fewer. A function returns the number for the batch that a block starts
            with; a block of 1 is then handed out as `(batch, ...)`. None hands out single batches `(batch, ...)`.
        host: whether to hand out NumPy arrays. A compiled program on the CPU takes them directly, at a tenth of the
            cost of converting them to JAX arrays. Batches are then read ahead in runs if reading one takes
            microseconds. Under `jax.transfer_guard`, which counts that as a transfer, they are converted all the same.

    Raises:
        ConfigError: the batch size does not divide over the sharding's devices.
        DataError: an entry is text or another Python object.

    Example:
        >>> import numpy as np, sapwood.data
        >>> data = sapwood.data.load({"x": np.arange(8.0)})
        >>> feed = to_device(sapwood.data.batches(data, 4, epochs=1, shuffle=False))
        >>> [b["x"].sum().item() for b in feed], feed.position
        ([6.0, 22.0], 2)
    """
    import jax

    if prefetch < 0:
        raise ConfigError(f"prefetch is {prefetch}; a number of batches, 0 for none, is expected")
    if isinstance(block, int) and block < 1:
        raise ConfigError(f"block is {block}; at least one batch is expected")
    if sharding is None and jax.process_count() > 1:
        raise ConfigError("with several processes a sharding is needed; sapwood.parallel.batch_sharding(mesh) gives it")
    rows = np.arange(batches.batch_size)
    if sharding is not None:
        if isinstance(sharding, jax.sharding.NamedSharding):
            check_batch_size(batches.batch_size, sharding)
        rows = _rows_here(batches.batch_size, sharding)
    guard = jax.config.jax_transfer_guard_host_to_device  # type: ignore[attr-defined]
    host = host and guard in (None, "allow")
    return DeviceBatches(batches.of_rows(rows), sharding, prefetch, block, host)


def _rows_here(batch_size: int, sharding: Any) -> np.ndarray:
    """The rows of a global batch that this process's devices hold, in order."""
    held = np.zeros(batch_size, bool)
    for index in sharding.addressable_devices_indices_map((batch_size,)).values():
        held[index[0]] = True
    return np.flatnonzero(held)


def _place(batch: dict[str, np.ndarray], batches: Batches, sharding: Any, row_axis: int, host: bool) -> dict[str, Any]:
    """Transfer a batch to the devices, unless `host`; `row_axis` is 0 for a batch and 1 for a block of batches.

    Raises `DataError` for an entry that is text or other Python objects.
    """
    import jax

    for name, values in batch.items():
        if values.dtype.kind in "OUSTM":
            raise DataError(
                f"{name} holds {_kind(values)}, which no device takes; use `map` to make it numbers, or leave it out"
            )
    if host:
        return batch
    if sharding is None:
        return jax.device_put(batch)
    if row_axis and isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(None, *sharding.spec)
        sharding = jax.sharding.NamedSharding(sharding.mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {name: _global(values, batches, sharding, row_axis) for name, values in batch.items()}


def _global(values: np.ndarray, batches: Batches, sharding: Any, row_axis: int) -> Any:
    """The global array of an entry; `values` are the rows `batches.rows` of it, which this process has read."""
    import jax

    shape = list(values.shape)
    shape[row_axis] = batches.batch_size

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[row_axis].indices(batches.batch_size)
        low, high = np.searchsorted(batches.rows, [start, stop])
        return values[(*index[:row_axis], slice(low, high), *index[row_axis + 1 :])]

    return jax.make_array_from_callback(tuple(shape), sharding, part)


def _kind(values: np.ndarray) -> str:
    """What an array that no device takes holds, in words for a message."""
    return {"M": "dates"}.get(values.dtype.kind) or ("text" if isinstance(values.flat[0], str) else "Python objects")

"""The feed of batches to the devices: sharded as the mesh wants it, a few batches ahead, without waiting."""

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
"""Batches in a run that is read in one go, at most."""
QUICK = 2e-3
"""Seconds that reading a run may take for the next one to be longer: a thread that works for less is all overhead."""


class DeviceBatches(Iterator[dict[str, Any]]):
    """An iterator of batches as global `jax.Array`s. Made by `to_device`.

    Its `position` counts the batches handed out, not those read ahead, so it is what a checkpoint keeps.
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
        """The number of the next batch to be handed out."""
        return self.batches.position

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    @property
    def steps(self) -> int | None:
        return self.batches.steps

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; see `Batches.state`."""
        return self.batches.state()

    def seek(self, position: int) -> "DeviceBatches":
        """Make batch `position` the next one; what was read ahead is dropped."""
        self.batches.seek(position)
        self._forget()
        return self

    def restore(self, state: Mapping[str, Any]) -> "DeviceBatches":
        """Go to where `state()` was taken; see `Batches.restore`."""
        self.batches.restore(state)
        self._forget()
        return self

    def _forget(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._ready.clear()
        self._next = self.batches.position

    def _size(self, step: int) -> int:
        """How many batches the one that starts at `step` takes: `block`, or what is left."""
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
            self._forget()  # so that asking again asks for the same batch
            raise
        self.batches.position = step + size
        return batch

    def _read_ahead(self) -> list[Any]:
        """What the thread has read, after it was asked for what comes next."""
        assert self._pool is not None
        while len(self._ahead) <= self._prefetch and (size := self._size(self._next)) > 0:
            run = self._length(self._next) if self._host and size == 1 else 1
            self._ahead.append(self._pool.submit(self._read, self._next, size, run))
            self._next += size * run
        return self._ahead.popleft().result()

    def _length(self, step: int) -> int:
        """How many single batches from `step` on are read in one go."""
        return next((n for n in range(1, self._run) if self._size(step + n) != 1), self._run)

    def _read(self, step: int, size: int, run: int) -> list[Any]:
        """A block of batches, or a run of single ones, which becomes longer where that is a matter of microseconds. An
        error stands where its batch would."""
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
    """Batches on the devices, as global arrays, read and transferred ahead by a thread of its own.

    Each process reads the rows that its own devices hold, whichever those are under the mesh, and no others. Nothing
    waits for a device: transfers are asynchronous.

    Args:
        batches: what `sapwood.data.batches` gives. The feed goes on from its position, and leaves it as it is.
        sharding: of the batch, such as `sapwood.parallel.batch_sharding(mesh)`: dimension 0 over the data axes.
            None puts everything on JAX's default device.
        prefetch: batches to read ahead; 0 reads each when it is asked for, in the caller's thread.
        block: hand out so many batches at once as arrays `(block, batch, ...)`, for several steps in one dispatch (the
            last may have fewer). A function says how many from the number of the batch they begin with; one is then
            handed out as it is, `(batch, ...)`.
        host: leave the arrays NumPy's. A compiled program on the CPU takes those as they are, at a tenth of the cost of
            making them JAX's. Batches are then read ahead in runs, where that is a matter of microseconds. Under
            `jax.transfer_guard`, which takes that for a transfer, they become JAX's all the same.

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
    """A global array of which this process has `batches.rows` in `values`."""
    import jax

    shape = list(values.shape)
    shape[row_axis] = batches.batch_size

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[row_axis].indices(batches.batch_size)
        low, high = np.searchsorted(batches.rows, [start, stop])
        return values[(*index[:row_axis], slice(low, high), *index[row_axis + 1 :])]

    return jax.make_array_from_callback(tuple(shape), sharding, part)


def _kind(values: np.ndarray) -> str:
    return {"M": "dates"}.get(values.dtype.kind) or ("text" if isinstance(values.flat[0], str) else "Python objects")

"""`Batches`: a seekable stream of global batches. Each process reads only its own rows of them.

`Plan` maps a batch number and a row to a position in the endless stream of examples; `Order` (data/shuffle.py) maps the
position to an example. Both compute this directly, so any batch can be read without reading those before it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.dataset import Batch, Dataset
from sapwood.data.shuffle import Order

REMAINDERS = ("wrap", "drop", "pad")
LARGE, TIMES = 1 << 20, 100  # a batch above LARGE is refused if it holds each example more than TIMES times


@dataclass(frozen=True)
class Plan:
    """The positions in the stream of examples that make up each global batch. It is the same in every process.

    Attributes:
        count: examples of the data set.
        batch_size: examples of a global batch.
        remainder: "wrap", "drop" or "pad", as in `batches`.
    """

    count: int
    batch_size: int
    remainder: str

    @property
    def steps_per_epoch(self) -> int:
        if self.remainder == "drop":
            return self.count // self.batch_size
        return -(-self.count // self.batch_size)

    def positions(self, steps: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the stream of examples, and whether each is a real example and not padding.

        Both are `(steps, rows)`: for each batch number of `steps` and each row of `rows` in the global batch.
        """
        if self.remainder == "wrap":
            places = steps[:, None] * self.batch_size + rows
            return places, np.ones(places.shape, bool)
        epochs, steps = np.divmod(steps, self.steps_per_epoch)
        places = steps[:, None] * self.batch_size + rows
        real = places < self.count
        return epochs[:, None] * self.count + np.minimum(places, self.count - 1), real


class Batches(Iterator[Batch]):
    """An iterator of batches, dicts of arrays `(rows, ...)`, that can seek to any position. Made by `batches`.

    The position is one integer, the number of the next global batch. Position and seed are the whole state, and they
    are valid for any number of processes. Iteration continues from the position and stops after `steps` batches;
    `seek(0)` starts again.

    Attributes:
        dataset: where the examples come from.
        batch_size: examples of a global batch.
        rows: the rows of each global batch that this process reads, int `(rows,)`.
        steps_per_epoch: batches per epoch.
        steps: batches in all; None for an endless stream.
        position: the number of the next batch.
        seed: the seed of the shuffling.
    """

    def __init__(self, dataset: Dataset, plan: Plan, order: Order, steps: int | None, rows: np.ndarray):
        self.dataset, self.steps, self.rows = dataset, steps, rows
        self._plan, self._order = plan, order
        self.position = 0

    @property
    def batch_size(self) -> int:
        return self._plan.batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self._plan.steps_per_epoch

    @property
    def seed(self) -> int:
        return self._order.seed

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self.position // self.steps_per_epoch

    def __next__(self) -> Batch:
        if self.steps is not None and self.position >= self.steps:
            raise StopIteration
        batch = self[self.position]
        self.position += 1
        return batch

    def __getitem__(self, step: int) -> Batch:
        """This process's rows of batch `step`. The position does not change."""
        return {name: values[0] for name, values in self.block(step, 1).items()}

    def block(self, step: int, count: int) -> Batch:
        """The `count` batches from `step` on as arrays `(count, rows, ...)`, read at once."""
        indices, real = self._indices(step, count)
        flat = self.dataset.gather(indices.reshape(-1))
        block = {name: a.reshape(indices.shape + a.shape[1:]) for name, a in flat.items()}
        if self._plan.remainder == "pad":
            block["mask"] = _masked(block["mask"], real) if "mask" in block else real
        return block

    def indices(self, step: int) -> np.ndarray:
        """The data-set indices of this process's rows of batch `step`, int64 `(rows,)`."""
        return self._indices(step, 1)[0][0]

    def _indices(self, step: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices, and whether each is a real example, both `(count, rows)`; IndexError for a batch out of range."""
        if step < 0 or (self.steps is not None and step + count > self.steps):
            last = "" if self.steps is None else self.steps - 1
            raise IndexError(f"there is no batch {step + count - 1 if step >= 0 else step}; batches are 0..{last}")
        places, real = self._plan.positions(np.arange(step, step + count), self.rows)
        return self._order(places.reshape(-1)).reshape(places.shape), real

    def seek(self, position: int) -> "Batches":
        """Make batch `position` the next one, and return this stream. `ConfigError` if it is out of range."""
        if position < 0 or (self.steps is not None and position > self.steps):
            raise ConfigError(f"position {position} is outside 0..{'' if self.steps is None else self.steps}")
        self.position = int(position)
        return self

    def of_rows(self, rows: np.ndarray) -> "Batches":
        """A copy of the stream, at the same position, that reads these rows of each global batch."""
        other = Batches(self.dataset, self._plan, self._order, self.steps, np.asarray(rows))
        return other.seek(self.position)

    def state(self) -> dict[str, int]:
        """The state for a checkpoint: plain integers, valid for any number of processes.

        `position` and `seed` are the state; `restore` uses the others to detect other data or another order.
        """
        return {
            "position": self.position,
            "seed": self.seed,
            "examples": self._plan.count,
            "batch_size": self.batch_size,
            "shuffle": int(self._order.shuffle),
            "remainder": REMAINDERS.index(self._plan.remainder),
        }

    def restore(self, state: Mapping[str, Any]) -> "Batches":
        """Seek to the position at which `state()` was taken. Keys that an older state lacks are not compared.

        Raises:
            DataError: the state is of data of another size, or of another batch size, seed, shuffle or remainder, for
                which the same position means other examples.
        """
        for name, value in self.state().items():
            if name != "position" and name in state and int(state[name]) != value:
                there, here = (REMAINDERS[int(x)] if name == "remainder" else x for x in (state[name], value))
                raise DataError(
                    f"the saved position is of data with {name.replace('_', ' ')} {there}; this has {here}. "
                    "Resume with the same data, batch size, seed, shuffle and remainder, or start afresh"
                )
        return self.seek(int(state["position"]))

    def __repr__(self) -> str:
        return (
            f"Batches({len(self.dataset)} examples, batch_size={self.batch_size}, seed={self.seed}, "
            f"remainder={self._plan.remainder!r}, steps={self.steps}, position={self.position})"
        )


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    remainder: Literal["wrap", "drop", "pad"] = "wrap",
    process_index: int | None = None,
    process_count: int | None = None,
) -> Batches:
    """Batches of a data set: deterministic by `seed`, seekable, the same for any number of processes.

    The examples form one endless stream of passes over the data, each pass a new permutation (`Order`). If `batch_size`
    does not divide the number n of examples, `remainder` decides:

    - "wrap", for training: batch k is the `batch_size` examples of the stream from k * batch_size on. The batch at the
      end of a pass is filled from the next pass, and the next batch continues there. Every batch is full, no example is
      skipped, and each comes once per pass. An epoch is ceil(n / batch_size) batches, so E epochs hold at least E
      passes.
    - "drop", for training: each pass is cut into floor(n / batch_size) batches, and its last examples are left out;
      with shuffling, each pass leaves out others.
    - "pad", for evaluation: each pass is cut into ceil(n / batch_size) batches. The last is padded with copies of the
      pass's last example, and every batch has an entry "mask", bool `(batch,)`, False for padding. If the data has a
      "mask" of its own, `(batch, ...)`, it is set to 0 for padding. Padding is a real example because zeros could break
      a logarithm, a norm or a check.

    A batch larger than the data set wraps over several passes, or is padded; with "drop" it is an error.

    Args:
        dataset: a data set, as `sapwood.data.load` returns.
        batch_size: examples of a global batch, over all processes.
        seed: the seed of the shuffling, 0 to 2**32 - 1.
        shuffle: False keeps the order of the data set.
        epochs: the stream ends after this many epochs; None is an endless stream.
        remainder: as above.
        process_index: which part of each global batch to read, of equal, contiguous parts; default JAX's process index.
        process_count: the number of those parts; default JAX's process count.

    Raises:
        ConfigError: the batch size is not positive, not divisible among the processes, or too large for the data set.

    Example:
        >>> import numpy as np, sapwood.data
        >>> data = sapwood.data.load({"x": np.arange(5)})
        >>> [b["x"].tolist() for b in batches(data, 2, shuffle=False, epochs=1)]
        [[0, 1], [2, 3], [4, 0]]
        >>> [b["mask"].tolist() for b in batches(data, 2, shuffle=False, epochs=1, remainder="pad")]
        [[True, True], [True, True], [True, False]]
        >>> stream = batches(data, 2, seed=7).seek(1000)
        >>> stream.state()
        {'position': 1000, 'seed': 7, 'examples': 5, 'batch_size': 2, 'shuffle': 1, 'remainder': 0}
    """
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"batches are made of a data set, not of {type(dataset).__name__}; sapwood.data.load makes one"
        )
    if remainder not in REMAINDERS:
        raise ConfigError(f"remainder is one of {', '.join(map(repr, REMAINDERS))}, not {remainder!r}")
    if epochs is not None and epochs < 1:
        raise ConfigError(f"epochs is {epochs}; at least 1 is expected, or None for an endless stream")
    plan = Plan(len(dataset), int(batch_size), remainder)
    if batch_size < 1:
        raise ConfigError(f"a batch has at least one example, not {batch_size}")
    if batch_size > max(LARGE, TIMES * len(dataset)):
        raise ConfigError(
            f"a batch of {batch_size:,} would hold each of {len(dataset):,} examples more than {TIMES} times; the size "
            "of the data set is the largest that makes sense"
        )
    if plan.steps_per_epoch == 0:
        raise ConfigError(
            f"a batch of {batch_size} is larger than the data set of {len(dataset)}, so remainder='drop' leaves "
            f"nothing; use batch_size={len(dataset)} or less, or remainder='wrap'"
        )
    rows = _rows(plan.batch_size, process_index, process_count)
    steps = None if epochs is None else epochs * plan.steps_per_epoch
    return Batches(dataset, plan, Order(len(dataset), seed, shuffle), steps, rows)


def _masked(mask: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Set the data's own mask `(steps, rows, ...)` to 0 for padding. (Multiplying by 0 would keep NaN.)"""
    return np.where(real.reshape(real.shape + (1,) * (mask.ndim - real.ndim)), mask, np.zeros((), mask.dtype))


def _rows(batch_size: int, index: int | None, count: int | None) -> np.ndarray:
    """The rows of a global batch that process `index` of `count` reads; `ConfigError` if it does not divide."""
    if index is None or count is None:
        import jax

        index = jax.process_index() if index is None else index
        count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise ConfigError(f"process {index} of {count}: the index is 0..{count - 1}")
    if batch_size % count:
        fit = batch_size - batch_size % count
        raise ConfigError(
            f"a batch of {batch_size} does not divide among {count} processes; use "
            f"{f'{fit} or ' if fit else ''}{fit + count}"
        )
    share = batch_size // count
    return np.arange(index * share, (index + 1) * share)

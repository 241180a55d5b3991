"""Checkpoints: pytrees of arrays that Orbax writes in the background and that are verified when they are read.

A checkpoint is a directory such as `00000120`, named after its step. It holds Orbax's files (each array by its path)
and `sapwood.json`: the step, the info and metrics of the run, the path, dtype, shape and digest of each array, and a
checksum over all of it. Orbax writes to a temporary directory and renames it when all files are there, so a killed run
leaves only complete checkpoints. Orbax 0.12 reads a damaged file without an error, so the digest of each array is
computed before it is written and again after it is read. Nothing on disk is unpickled.
"""

import contextlib
import functools
import math
import operator
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sapwood.core import paths
from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.core.messages import first_names, short
from sapwood.runtime.processes import all_or_none, union
from sapwood.saving import array_bits, orbax_arrays
from sapwood.saving.best_metric import goal
from sapwood.saving.checkpoint_directory import Directory
from sapwood.saving.checksummed_json import seal, unseal
from sapwood.saving.digest import RULE, describe, digests, named_leaves
from sapwood.saving.retention import Retention

INDEX = "sapwood.json"
_FORMAT = 2  # Sapwood 0.1 wrote format 1, with digests of rule 1
_Structs = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Info:
    """The metadata of a checkpoint.

    Args:
        step: the step of the checkpoint.
        info: the `info` passed to `Checkpoints.save`.
        metrics: the metrics passed to `Checkpoints.save`, by name.
        digests: the digest of each array by its path.
        best: the metric by which the run keeps its best checkpoint, such as "min:loss"; None if it keeps none.
        rule: the rule of the digests; 1 for what Sapwood 0.1 wrote.
    """

    step: int
    info: dict[str, Any]
    metrics: dict[str, float]
    digests: dict[str, str]
    best: str | None = None
    rule: int = RULE


class _Damaged(CheckpointError):
    """This checkpoint is damaged; another one may be intact."""


_together = functools.partial(all_or_none, mild=_Damaged)  # mild: another checkpoint can replace a damaged one


class Checkpoints:
    """The checkpoints of one run in a directory: the newest ones, and the best one by a metric.

    `save` copies the arrays to the host, starts to write and returns; the arrays may be donated at once. Use the object
    as a context manager, or call `close`, so that the last checkpoint is written completely. With several processes
    every process makes the same calls, and all of them must see the directory. Nothing is created or removed before the
    first `save`.

    Args:
        directory: the directory of the run's checkpoints; it need not exist.
        keep: how many of the newest checkpoints are kept, at least 1.
        best: "max:METRIC" or "min:METRIC" also keeps the checkpoint where that metric was largest or smallest. None
            keeps only the newest ones.

    Raises:
        ConfigError: `directory` is the address of a bucket, `keep` is below 1, or `best` has another form.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with Checkpoints(directory, keep=2, best="max:accuracy") as checkpoints:
    ...     for step, accuracy in [(10, 0.9), (20, 0.7), (30, 0.8), (40, 0.6)]:
    ...         tree = {"params": {"w": jax.numpy.full(3, step)}, "key": jax.random.key(step)}
    ...         checkpoints.save(step, tree, {"position": 32 * step}, {"accuracy": accuracy})
    >>> checkpoints.steps(), checkpoints.best()
    ([10, 30, 40], 10)
    >>> tree, info = Checkpoints(directory).restore(tree)
    >>> tree["params"]["w"], info.step, info.info
    (Array([40, 40, 40], dtype=int32), 40, {'position': 1280})
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3, best: str | None = None):
        if "://" in str(directory):
            raise ConfigError(
                f"checkpoints go to a directory, not to {directory}; mount the bucket (gcsfuse) and name the mount"
            )
        self.directory = Path(directory).expanduser().absolute()
        self._disk = Directory(self.directory)
        self._retention = Retention(keep, goal(best))
        # The step that this run restored or saved last. Later checkpoints do not belong to this run.
        self._newest: int | None = None
        self._passed: set[int] = set()  # the steps of damaged checkpoints that `restore` skipped
        self._writing: int | None = None
        self._known: dict[int, Info] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending, as this process sees them. Damage is found only by reading.

        >>> Checkpoints("no/such/directory").steps()
        []
        """
        return self._disk.steps()

    def candidates(self) -> list[int]:
        """The steps that any process sees, ascending. All processes must call it, and all get the same list.

        >>> Checkpoints("no/such/directory").candidates()
        []
        """
        return union(_together(self.steps))

    def latest(self) -> int | None:
        """The newest step; None if there is no checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best metric (the earliest of equals); None if no checkpoint has that metric.

        Without `best=` in the constructor, the `best` that the newest checkpoint was saved with is used.
        """
        return self._retention.best_of(self._said(self.steps()))

    def choose(self, step: int | str | None = None) -> int | None:
        """Resolve the `step` that a user asks for to a step number, or to None for the newest intact checkpoint.

        A number stays a number. "best" gives the step of the best checkpoint, "last" gives None. None gives the best
        step if the run keeps a best checkpoint, else None. The result is a `step` for `restore`.

        Raises CheckpointError for "best" if there is no best checkpoint, and ConfigError for any other value that is
        not an integer from 0 on.

        >>> Checkpoints("no/such/directory").choose("last")
        """
        if step == "last":
            return None
        if step is None or step == "best":
            best = self.best()
            if step is not None and best is None:
                raise CheckpointError(f'{self.directory} has no best checkpoint: the run did not say by which metric '
                                      f'(best="min:validation_loss"); it has {self.steps() or "none"}')  # fmt: skip
            return best
        return _step(step)

    def order(self, step: int | str | None = None) -> list[int]:
        """The steps that `restore` tries, in order.

        A number gives only that step. None and "last" give all steps from the newest to the oldest. "best" gives the
        steps from the best to the worst metric, then those without the metric from the newest on. A checkpoint whose
        index cannot be read comes first, because it may be the best one.
        """
        if step not in (None, "best", "last"):
            return [_step(step)]
        left = self.candidates()
        if step != "best":
            return left[::-1]
        said = self._said(left)
        ranked = [*(n for n in left if n not in said), *self._retention.ranked(said)]
        return ranked + [n for n in left[::-1] if n not in ranked]

    def info(self, step: int) -> Info:
        """The metadata of checkpoint `step`. Reads no arrays. Raises CheckpointError for a damaged index."""
        if step not in self._known:
            self._known[step] = _info(self._read_index(step))
        return self._known[step]

    def contents(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of each array of checkpoint `step`, by path. Raises CheckpointError for a damaged index."""
        return _structs(self._read_index(step))

    def save(
        self,
        step: int,
        tree: Any,
        info: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Start to write a checkpoint in the background, and return.

        It first waits for the previous write. A write that fails in the background raises its error in the next
        `save`, `wait` or `close`.

        Args:
            step: the step of the checkpoint, an integer from 0 on. An existing checkpoint of this step is replaced.
            tree: any pytree of arrays.
            info: any dictionary that JSON can hold, such as the position in the data and the seed.
            metrics: maps names to numbers; the metric of `best=` is read from here.

        Raises:
            CheckpointError: the disk is full, the directory cannot be written, or it holds checkpoints of an earlier
                run that was not restored.
            ConfigError: a leaf is not an array, JSON cannot hold `info`, `step` is not an integer from 0 on, the
                metrics lack the one of `best=`, or the path of the directory contains one of * ? [ ].
        """
        step = _step(step)
        self._disk.check_name()
        self.wait()
        arrays = _arrays(tree)
        index = {
            "format": _FORMAT,
            "digest": RULE,
            "step": step,
            "info": dict(info or {}),
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
        }
        self._retention.check(index["metrics"])
        marks = digests(arrays)  # before the write, so that they describe the arrays and not what reached the disk
        index["arrays"] = {name: [*describe(x), marks[name]] for name, x in arrays.items()}
        if self._retention.best is not None:
            index["best"] = str(self._retention.best)
        if slashed := _slashed(tree):
            index["slashed"] = slashed
        try:
            text = seal(index)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the info of a checkpoint must be what JSON can hold: {error}") from error
        _together(lambda: self._make_room(step))
        stored = {name: array_bits.encode(x) for name, x in arrays.items() if x.size}
        with self._writes(step):
            self._writer.save(self._disk.own(step), stored, text)
        self._writing = step

    def wait(self) -> None:
        """Wait until the write is complete, then remove old checkpoints. Raises CheckpointError if the write failed."""
        if self._writing is None:
            return
        step, self._writing = self._writing, None
        with self._writes(step):
            self._writer.wait()
        self._newest = step
        self._passed.discard(step)
        self._known.pop(step, None)
        if jax.process_index() == 0:
            self._disk.keep_only(self._kept)

    def close(self) -> None:
        """`wait`, then stop Orbax's threads."""
        try:
            self.wait()
        finally:
            if "_writer" in self.__dict__:
                self._writer.close()
                del self.__dict__["_writer"]

    def restore(self, target: Any = None, *, step: int | str | None = None, subset: bool = False) -> tuple[Any, Info]:
        """Read a checkpoint into the structure and shardings of `target`.

        A damaged checkpoint is skipped with a warning that names its damaged arrays, and the next one is read. With
        several processes all of them must call it, and all get the same checkpoint.

        Args:
            target: a pytree of arrays, of `jax.ShapeDtypeStruct`s (their shardings are used, on any mesh) or of
                `Param`s. None gives nested dicts by path on the default device.
            step: None or "last" reads the newest intact checkpoint, "best" the best intact one. A number reads only
                that checkpoint and never another one.
            subset: the checkpoint may hold arrays that `target` does not ask for.

        Returns:
            The restored tree, and the `Info` of its checkpoint.

        Raises:
            CheckpointError: there is no checkpoint, none is intact, or it belongs to another model; then the message
                lists the paths that differ.
            ConfigError: a sharding does not divide its array.
        """
        wanted = None
        if target is not None:
            wanted = {name: array_bits.struct_of(name, leaf) for name, leaf in named_leaves(target).items()}
        self.wait()
        steps, order = self.candidates(), self.order(step)
        if not set(order) <= set(steps):
            raise CheckpointError(f"{self.directory} has no checkpoint of step {step}; it has {steps or 'none'}")
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        reasons: dict[int, str] = {}
        next_best = "taking the next best one" if step == "best" else "going back to the checkpoint before it"
        for candidate in order:
            try:
                arrays, info = self._restore(candidate, wanted, subset)
            except _Damaged as error:
                reasons[candidate] = str(error)
                if candidate != order[-1]:
                    warnings.warn(f"{error}; {next_best}", stacklevel=2)
                continue
            self._newest, self._passed = candidate, set(reasons)
            return _tree(target, arrays), info
        raise CheckpointError(f"no whole checkpoint in {self.directory}: {'; '.join(reasons.values())}")

    # Reading

    def _restore(self, step: int, wanted: _Structs | None, subset: bool) -> tuple[dict[str, jax.Array], Info]:
        """Read and verify one checkpoint.

        Each process reads its shards by itself. Decoding and digests run programs that all processes must enter, so the
        processes agree before and after them.
        """
        index, structs, stored = _together(lambda: self._read_stored(step, wanted, subset))
        arrays = {
            name: array_bits.decode(stored.pop(name) if name in stored else array_bits.empty(x), x)
            for name, x in structs.items()
        }
        _together(lambda: self._check_digests(step, index, arrays))
        return arrays, _info(index)

    def _read_stored(self, step: int, wanted: _Structs | None, subset: bool) -> tuple[dict[str, Any], _Structs, dict]:
        """The index, the structs of the arrays to restore, and the arrays in their stored form."""
        index = self._read_index(step)
        if wanted is None:
            if "slashed" in index:
                raise CheckpointError(
                    f"checkpoint {step} in {self.directory} holds {first_names(index['slashed'])}, where a slash is "
                    "part of a name; nested dicts cannot be told from that: give restore a target"
                )
            wanted = _structs(index)
        else:
            self._check_same_model(step, index["arrays"], wanted, subset)
        return index, wanted, self._read_arrays(step, wanted)

    def _read_arrays(self, step: int, structs: _Structs) -> dict[str, jax.Array]:
        stored = {name: array_bits.stored_struct(x) for name, x in structs.items() if math.prod(x.shape)}
        try:
            return orbax_arrays.read(self._disk.place(step), stored)
        except Exception as error:
            if _out_of_memory(error):
                raise
            bad = [name for name, x in stored.items() if not self._readable(step, name, x)]
            raise self._damage(step, f"{first_names(bad)} cannot be read" if bad else short(error)) from error

    def _readable(self, step: int, name: str, stored: jax.ShapeDtypeStruct) -> bool:
        try:
            orbax_arrays.read(self._disk.place(step), {name: stored})
        except Exception:
            return False
        return True

    def _read_index(self, step: int) -> dict[str, Any]:
        place = self._disk.place(step)
        odd = next((path for path in place.rglob("*") if not path.is_file() and not path.is_dir()), None)
        if odd is not None:  # reading a pipe would block
            raise self._damage(step, f"{odd.name} is no file")
        try:
            index = unseal((place / INDEX).read_bytes())
            if index["step"] != step:
                raise ValueError(f"it is that of step {index['step']}")
            if [type(index[name]) for name in ("format", "arrays", "info")] != [int, dict, dict]:
                raise ValueError("it was not written by Sapwood")
        except (OSError, ValueError, KeyError) as error:
            raise self._damage(step, f"{INDEX}: {short(error)}") from error
        if index["format"] > _FORMAT or _rule(index) > RULE:
            raise CheckpointError(f"checkpoint {step} in {self.directory} was written by a newer Sapwood; update it")
        return index

    def _check_digests(self, step: int, index: dict[str, Any], arrays: dict[str, jax.Array]) -> None:
        found = digests(arrays, _rule(index))
        wrong = [name for name in arrays if found[name] != index["arrays"][name][2]]
        if wrong:
            raise self._damage(step, f"{first_names(wrong)} read back other than saved")

    def _check_same_model(self, step: int, saved: dict[str, list], structs: dict[str, Any], subset: bool) -> None:
        missing = [name for name in structs if name not in saved]
        unexpected = [] if subset else [name for name in saved if name not in structs]
        kinds = [
            (name, array_bits.describe_type(*saved[name][:2]), array_bits.describe_type(*describe(x)))
            for name, x in structs.items()
            if name in saved
        ]
        other = [f"{name} is {there} there and {here} here" for name, there, here in kinds if there != here]
        parts = [f"it lacks {first_names(missing)}"] if missing else []
        parts += [f"it has {first_names(unexpected)} in addition"] if unexpected else []
        parts += [first_names(other, quote=False)] if other else []
        if parts:
            raise CheckpointError(f"checkpoint {step} in {self.directory} is of another model: {'; '.join(parts)}")

    def _damage(self, step: int, what: str) -> _Damaged:
        return _Damaged(f"checkpoint {step} in {self.directory} is damaged: {what}")

    # Writing

    @functools.cached_property
    def _writer(self) -> orbax_arrays.Writer:
        return orbax_arrays.Writer(INDEX)

    def _make_room(self, step: int) -> None:
        """Prepare the directory for a new checkpoint.

        Raises CheckpointError if it holds checkpoints of an earlier run that this run did not restore.
        """
        steps = self.steps()
        if steps and self._newest is None:
            raise CheckpointError(
                f"{self.directory} already holds checkpoints of an earlier run ({steps[-1]} is the newest); "
                "resume from them, or choose another directory"
            )
        if jax.process_index() == 0:
            with self._writes(step):
                self._disk.make_room(step)

    @contextlib.contextmanager
    def _writes(self, step: int) -> Iterator[None]:
        """Turn an error of a write into a `CheckpointError` that explains it, and put the old checkpoint back."""
        try:
            yield
        except Exception as error:
            if jax.process_index() == 0:
                with contextlib.suppress(OSError, CheckpointError):  # if this fails, the next save puts it back
                    self._disk.put_back()
            raise self._failure(step, error) from error

    def _kept(self, steps: list[int]) -> set[int]:
        return self._retention.kept(steps, self._said(steps), newest=self._newest or 0, passed=self._passed)

    def _said(self, steps: list[int]) -> dict[int, Info]:
        """`info(step)` of the steps whose index is intact."""
        said = {}
        for step in steps:
            with contextlib.suppress(CheckpointError):
                said[step] = self.info(step)
        return said

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        refused = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        if not refused and not self.directory.exists():
            return CheckpointError(
                f"checkpoint {step} could not be written: {self.directory} was removed, or moved, in the meantime"
            )
        try:
            free = f" ({shutil.disk_usage(self.directory).free / 1e6:,.1f} MB free there)"
        except OSError:
            free = ""
        return CheckpointError(
            f"checkpoint {step} could not be written to {self.directory}: {short(error)}{free}; earlier checkpoints "
            "are untouched: make room or choose another directory, and resume"
        )


def _arrays(tree: Any) -> dict[str, Any]:
    """The leaves of the tree by path, as `jax.Array`s."""
    try:
        arrays = {name: array_bits.as_array(name, leaf) for name, leaf in named_leaves(tree).items()}
    except ValueError as error:
        raise ConfigError(f"this tree cannot be saved: {error}") from error
    if not any(x.size for x in arrays.values()):
        raise ConfigError("this tree cannot be saved: it holds no numbers")
    return arrays


def _slashed(tree: Any) -> list[str]:
    """The paths of the leaves that have a slash inside one of their names."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    simple = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return [simple(path) for path, _ in found if any("/" in simple((name,)) for name in path)]


def _info(index: dict[str, Any]) -> Info:
    marks = {name: mark for name, (_, _, mark) in index["arrays"].items()}
    return Info(index["step"], index["info"], index["metrics"], marks, index.get("best"), _rule(index))


def _rule(index: dict[str, Any]) -> int:
    """The rule of the digests in an index."""
    return index.get("digest", 1)


def _step(step: Any) -> int:
    """Convert an integer of Python, NumPy or JAX to a Python int. Raises ConfigError if it is not an integer >= 0."""
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise ConfigError(f"step={step!r}: the step of a checkpoint is an integer from 0 on")
    return number


def _out_of_memory(error: Exception) -> bool:
    """Whether the error says that memory ran out here, which does not mean that the checkpoint is damaged."""
    return isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


def _structs(index: dict[str, Any]) -> _Structs:
    return {name: array_bits.struct(dtype, shape) for name, (dtype, shape, _) in index["arrays"].items()}


def _tree(target: Any, arrays: dict[str, jax.Array]) -> Any:
    """Put arrays by path into the structure of `target`, or into nested dicts if `target` is None.

    A leaf that is a NumPy array in `target` becomes a NumPy array.
    """
    if target is None:
        return paths.nest((tuple(name.split("/")), x) for name, x in arrays.items())
    leaves = [
        np.asarray(x) if isinstance(leaf, np.ndarray) else x
        for leaf, x in zip(jax.tree.leaves(target), arrays.values(), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)

"""Checkpoints: any pytree of arrays, written by Orbax while training goes on, and checked when it is read.

A checkpoint is a directory `00000120`, named after its step: Orbax's files (every array by its path), and
`sapwood.json`: step, information and metrics of the run, each array's path, dtype, shape and digest, and a checksum
over all that. Orbax writes under another name and renames when all is there, so a run that is killed leaves whole
checkpoints or none. Orbax 0.12 reads a damaged file without a word; here each array's digest is taken before it is
written and again after it is read. Nothing on disk is unpickled.
"""

import functools
import logging
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sapwood.core import paths
from sapwood.core.errors import CheckpointError, ConfigError
from sapwood.train import storage
from sapwood.train.digest import describe, digests, named_leaves
from sapwood.train.sealed import seal, unseal

INDEX = "sapwood.json"
_FORMAT = 1
_STEP = re.compile(r"\d{8,}")
_ASIDE = ".replaced"


@dataclass(frozen=True)
class Info:
    """What a checkpoint says of itself: `step`, the `info` and `metrics` given to `save`, and the arrays'
    `digests` by path."""

    step: int
    info: dict[str, Any]
    metrics: dict[str, float]
    digests: dict[str, str]


class _Damaged(CheckpointError):
    """This checkpoint is not whole; another one may be."""


class Checkpoints:
    """The checkpoints of one run in `directory`: the newest `keep` and, with `best="accuracy"`, the one where
    that metric was largest (`best="-loss"`: smallest).

    `save` copies the arrays to the host, starts to write and returns; the arrays may be donated at once. Use it as a
    context manager, or call `close`, so that the last one is written out. On several processes every process makes
    the same calls, over a directory that all of them see. Nothing is created or removed before the first `save`.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with Checkpoints(directory, keep=2, best="accuracy") as checkpoints:
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
        if keep < 1:
            raise ConfigError(f"keep={keep}: at least the newest checkpoint is kept")
        if best is not None and not best.removeprefix("-"):
            raise ConfigError(f'best={best!r}: name a metric, "accuracy" (largest is best) or "-loss" (smallest is)')
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._best = best
        self._newest: int | None = (
            None  # the step this run restored or saved last; whatever is later is not of this run
        )
        self._writing: int | None = None
        self._known: dict[int, Info] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps with a checkpoint, ascending; whether each is whole shows when it is read.

        >>> Checkpoints("no/such/directory").steps()
        []
        """
        try:
            names = os.listdir(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"the checkpoints in {self.directory} cannot be listed: {error.strerror}") from error
        return sorted(int(name) for name in names if _STEP.fullmatch(name))

    def latest(self) -> int | None:
        """The newest step, or None where nothing was saved yet."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best metric (the earlier of equals); None where no checkpoint has that metric."""
        return self._best_of(self.steps())

    def info(self, step: int) -> Info:
        """What checkpoint `step` says of itself, without reading its arrays; CheckpointError if it is damaged."""
        if step not in self._known:
            self._known[step] = _info(self._read_index(step))
        return self._known[step]

    def contents(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of checkpoint `step` by path: shape and dtype. CheckpointError if it is damaged."""
        arrays = self._read_index(step)["arrays"]
        return {name: storage.struct(dtype, shape) for name, (dtype, shape, _) in arrays.items()}

    def save(
        self,
        step: int,
        tree: Any,
        info: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Start to write `tree`, any pytree of arrays, as checkpoint `step`, and return.

        `info` is anything that JSON holds (the position in the data, the seed); `metrics` maps names to numbers.
        A failure of the write in the background is raised by the next `save`, `wait` or `close`.

        Raises CheckpointError where the disk is full, the directory cannot be written or belongs to an earlier run
        that was not restored; ConfigError for leaves that are no arrays or an `info` that is no JSON.
        """
        self.wait()
        arrays = _arrays(tree)
        index = {
            "format": _FORMAT,
            "step": step,
            "info": dict(info or {}),
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
        }
        self._check_metrics(index["metrics"])
        marks = digests(arrays)  # before the write: these are the arrays as they were, whatever the disk makes of them
        index["arrays"] = {name: [*describe(x), marks[name]] for name, x in arrays.items()}
        try:
            text = seal(index)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the info of a checkpoint must be what JSON can hold: {error}") from error
        self._make_room(step)
        stored = {name: storage.encode(x) for name, x in arrays.items() if x.size}
        try:
            self._writer.index = text
            self._writer.checkpointer.save(self._path(step), args=self._writer.save_args(stored))
        except Exception as error:
            raise self._failure(step, error) from error
        self._writing = step

    def wait(self) -> None:
        """Wait until all is written, then drop what need not be kept. Raises CheckpointError if a write failed."""
        if self._writing is None:
            return
        step, self._writing = self._writing, None
        try:
            self._writer.checkpointer.wait_until_finished()
        except Exception as error:
            raise self._failure(step, error) from error
        self._newest = step
        if jax.process_index() == 0:
            self._prune()

    def close(self) -> None:
        """`wait`, and let go of Orbax's threads."""
        try:
            self.wait()
        finally:
            if "_writer" in self.__dict__:
                self._writer.checkpointer.close()
                del self.__dict__["_writer"]

    def restore(self, target: Any = None, *, step: int | None = None, subset: bool = False) -> tuple[Any, Info]:
        """Read the newest whole checkpoint (or that of `step`) into the structure and shardings of `target`.

        `target` is a pytree of arrays, `jax.ShapeDtypeStruct`s (their shardings are used, on any mesh) or `Param`s;
        None gives nested dicts by path on the default device. With `subset=True` the checkpoint may hold more than
        `target` asks for. A damaged checkpoint is passed over with a warning that names the arrays.

        Raises CheckpointError if there is none, none is whole, or it is of another model: then with the differing
        paths. A `step` asked for by number is never replaced by another.
        """
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory} has no checkpoint of step {step}; it has {steps or 'none'}")
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        reasons = []
        for candidate in [step] if step is not None else reversed(steps):
            try:
                tree, info = self._restore(candidate, target, subset)
            except _Damaged as error:
                reasons.append(str(error))
                if step is None and candidate != steps[0]:
                    warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
                continue
            self._newest = candidate
            return tree, info
        raise CheckpointError(f"no whole checkpoint in {self.directory}: {'; '.join(reasons)}")

    # Reading

    def _restore(self, step: int, target: Any, subset: bool) -> tuple[Any, Info]:
        index = self._read_index(step)
        saved = index["arrays"]
        if target is None:
            structs = self.contents(step)
        else:
            structs = {name: storage.as_struct(name, leaf) for name, leaf in named_leaves(target).items()}
            self._check_same_model(step, saved, structs, subset)
        arrays = self._read_arrays(step, structs)
        found = digests(arrays)
        wrong = [name for name in arrays if found[name] != saved[name][2]]
        if wrong:
            raise self._damage(step, f"{_some(wrong)} read back other than saved")
        if target is None:
            tree = paths.nest((tuple(name.split("/")), x) for name, x in arrays.items())
        else:
            leaves = [
                np.asarray(x) if isinstance(leaf, np.ndarray) else x
                for leaf, x in zip(jax.tree.leaves(target), arrays.values(), strict=True)
            ]
            tree = jax.tree.unflatten(jax.tree.structure(target), leaves)
        return tree, _info(index)

    def _read_arrays(self, step: int, structs: dict[str, Any]) -> dict[str, Any]:
        stored = {name: storage.stored_struct(x) for name, x in structs.items() if math.prod(x.shape)}
        found = self._attempt(step, stored)
        if isinstance(found, Exception):
            bad = [name for name, x in stored.items() if isinstance(self._attempt(step, {name: x}), Exception)]
            raise self._damage(step, f"{_some(bad)} cannot be read" if bad else _short(found)) from found
        return {
            name: storage.decode(found[name] if name in found else storage.empty(x), x) for name, x in structs.items()
        }

    def _attempt(self, step: int, stored: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array] | Exception:
        """The arrays, or the exception: on several processes all of them go the same way."""
        try:
            result = self._read(step, stored) if stored else {}
        except Exception as error:
            result = error
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            failed = np.asarray(multihost_utils.process_allgather(np.array(isinstance(result, Exception))))
            if failed.any() and not isinstance(result, Exception):
                result = RuntimeError(f"it cannot be read on process {int(failed.argmax())}")
        return result

    def _read(self, step: int, stored: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        ocp = _orbax()
        args = {name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape) for name, x in stored.items()}
        args = ocp.args.PyTreeRestore(item=stored, restore_args=args, partial_restore=True)
        arrays = _reader().restore(self._path(step), args=args)
        for name, x in stored.items():
            if not isinstance(arrays[name], jax.Array) or describe(arrays[name]) != describe(x):
                raise ValueError(f"{name} is no longer {storage.kind(*describe(x))}")
        return arrays

    def _read_index(self, step: int) -> dict[str, Any]:
        file = self._path(step) / INDEX
        try:
            index = unseal(file.read_bytes())
            if index["step"] != step:
                raise ValueError(f"it is that of step {index['step']}")
        except (OSError, ValueError, KeyError) as error:
            raise self._damage(step, f"{INDEX}: {_short(error)}") from error
        if index["format"] != _FORMAT:
            raise CheckpointError(f"checkpoint {step} in {self.directory} was written by a newer Sapwood; update it")
        return index

    def _check_same_model(self, step: int, saved: dict[str, list], structs: dict[str, Any], subset: bool) -> None:
        missing = [name for name in structs if name not in saved]
        unexpected = [] if subset else [name for name in saved if name not in structs]
        kinds = [
            (name, storage.kind(*saved[name][:2]), storage.kind(*describe(x)))
            for name, x in structs.items()
            if name in saved
        ]
        other = [f"{name} is {there} there and {here} here" for name, there, here in kinds if there != here]
        parts = [f"it lacks {_some(missing)}"] if missing else []
        parts += [f"it has {_some(unexpected)} in addition"] if unexpected else []
        parts += [_some(other, quote=False)] if other else []
        if parts:
            raise CheckpointError(f"checkpoint {step} in {self.directory} is of another model: {'; '.join(parts)}")

    def _damage(self, step: int, what: str) -> _Damaged:
        return _Damaged(f"checkpoint {step} in {self.directory} is damaged: {what}")

    # Writing

    @functools.cached_property
    def _writer(self) -> "_Writer":
        return _Writer()

    def _path(self, step: int) -> Path:
        return self.directory / f"{step:08d}"

    def _make_room(self, step: int) -> None:
        """Create the directory, clear what a killed run left half-written, move an abandoned checkpoint aside."""
        steps = self.steps()
        if steps and self._newest is None:
            raise CheckpointError(
                f"{self.directory} already holds checkpoints of an earlier run ({steps[-1]} is the newest); "
                "resume from them, or choose another directory"
            )
        if jax.process_index() != 0:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
            if step in steps:
                self._aside(step)
        except OSError as error:
            raise self._failure(step, error) from error

    def _aside(self, step: int) -> None:
        self._known.pop(step, None)
        self._path(step).rename(self.directory / f"{step:08d}{_ASIDE}")

    def _prune(self) -> None:
        """Remove what is neither new nor best; renamed first, so that no half of it is ever trusted."""
        steps = [step for step in self.steps() if step <= (self._newest or 0)]
        kept = {*steps[-self.keep :], self._best_of(steps)}
        for step in self.steps():
            if step not in kept:
                self._aside(step)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what was moved aside, and what a write that did not end has left."""
        for name in os.listdir(self.directory):
            if name.endswith(_ASIDE) or ".orbax-checkpoint-tmp" in name:
                shutil.rmtree(self.directory / name)

    def _best_of(self, steps: list[int]) -> int | None:
        if self._best is None:
            return None
        metric = self._best.removeprefix("-")
        values = {}
        for step in steps:
            try:
                value = self.info(step).metrics.get(metric, math.nan)
            except CheckpointError:
                continue
            if not math.isnan(value):
                values[step] = -value if self._best.startswith("-") else value
        return max(values, key=lambda step: values[step], default=None)

    def _check_metrics(self, metrics: dict[str, float]) -> None:
        name = (self._best or "").removeprefix("-")
        if name and metrics and name not in metrics:
            raise ConfigError(
                f"best={self._best!r}, but the metrics are {sorted(metrics)}{paths.nearest(name, metrics)}"
            )

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        try:
            free = f" ({shutil.disk_usage(self.directory).free / 1e6:,.1f} MB free there)"
        except OSError:
            free = ""
        return CheckpointError(
            f"checkpoint {step} could not be written to {self.directory}: {_short(error)}{free}; earlier checkpoints "
            "are untouched: make room or choose another directory, and resume"
        )


class _Writer:
    """Orbax's asynchronous checkpointer, set up for little overhead, that writes the index before it renames."""

    def __init__(self):
        ocp = _orbax()
        writer = self
        self.index = ""

        class Handler(ocp.PyTreeCheckpointHandler):
            def finalize(self, directory: Any) -> None:
                super().finalize(directory)
                (directory / INDEX).write_text(writer.index)

        @ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
        @dataclass
        class Save(ocp.args.PyTreeSave):
            pass

        self.save_args = Save
        # No files about shardings and layouts: restore is always told its own. No compression: weights hardly
        # compress, and the processors have a network to train. Together 120 -> 70 ms of processor time for 30 arrays.
        arrays = ocp.type_handlers.ArrayHandler(array_metadata_store=None, enable_write_sharding_file=False)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        self.checkpointer = ocp.AsyncCheckpointer(
            Handler(type_handler_registry=registry, use_compression=False),
            checkpoint_metadata_store=ocp.metadata.metadata_store(enable_write=False),
        )


def preload() -> threading.Thread:
    """Import Orbax (0.4 s) in a thread, to be started where the main thread waits for the compiler."""
    thread = threading.Thread(target=_orbax, name="import orbax", daemon=True)
    thread.start()
    return thread


@functools.cache
def _orbax() -> Any:
    import orbax.checkpoint as ocp

    # What fails comes here as an exception. absl would print a page of traceback for each of Orbax's threads too, and
    # asyncio one for each array that Orbax no longer waited for.
    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: not re.search("orbax|tensorstore", record.getMessage()))
    return ocp


@functools.cache
def _reader() -> Any:
    return _orbax().PyTreeCheckpointHandler()


def _arrays(tree: Any) -> dict[str, Any]:
    """The tree's leaves by path, all of them `jax.Array`s."""
    try:
        arrays = {name: storage.as_array(name, leaf) for name, leaf in named_leaves(tree).items()}
    except ValueError as error:
        raise ConfigError(f"this tree cannot be saved: {error}") from error
    if not any(x.size for x in arrays.values()):
        raise ConfigError("this tree cannot be saved: it holds no numbers")
    return arrays


def _info(index: dict[str, Any]) -> Info:
    marks = {name: mark for name, (_, _, mark) in index["arrays"].items()}
    return Info(index["step"], index["info"], index["metrics"], marks)


def _some(names: list[str], quote: bool = True) -> str:
    shown = ", ".join(f"{name!r}" if quote else name for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _short(error: BaseException) -> str:
    """One line; of TensorStore's long messages what the operating system said."""
    text = " ".join(str(error).split()) or type(error).__name__
    cause = re.search(r"OS error \d+: \w+ ([^\[\]]+)", text)
    if cause:
        return cause[1]
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-95:]}"

"""Artifacts: a trained model in a portable directory, written by `sw.save` and read, fully or partly, by `sw.load`.

The directory holds two files. `weights.safetensors` holds the arrays by path, in the common exchange format for weights
(the `safetensors` package: a few kB of code, and its files cannot run code). `artifact.json` holds everything else
under a checksum: the reference to the model and its options, the learned features, the class names, the preprocessing,
and a digest of each array.

`load` also reads run directories and checkpoints. Each kind of source becomes a `_Source`, so that the rest of `load`
is the same for all of them.
"""

import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core import paths
from sapwood.core.errors import CheckpointError, ConfigError, DataError
from sapwood.core.init import draw
from sapwood.core.messages import first_names
from sapwood.core.param import Param
from sapwood.core.rng import as_key
from sapwood.core.short_repr import in_brief
from sapwood.core.spec import Spec
from sapwood.core.trusted_packages import Trust, trusted
from sapwood.data.feature import Feature
from sapwood.data.learned_features import Learned
from sapwood.saving import array_bits, checksummed_json, model_reference
from sapwood.saving.checkpoints import Checkpoints
from sapwood.saving.digest import RULE, describe, digests, named_leaves
from sapwood.saving.match_paths import Report, match

WEIGHTS, ABOUT = "weights.safetensors", "artifact.json"
_FORMAT = 2  # Sapwood 0.1 wrote format 1, with digests of rule 1
_OURS = {"format": _FORMAT, "digest": RULE}


@dataclass(frozen=True)
class Artifact:
    """A model that `load` read.

    Args:
        params: the parameters, nested dicts of arrays.
        state: the model state (such as batch statistics), nested dicts of arrays.
        reference: the import name of the model and its options, as JSON types. The property `model` imports it. None
            if it was saved without a model, or was read from a checkpoint.
        features: what training learned of its data; `Dataset.held_to` matches other data with it.
        classes: the class names.
        preprocessing: the `preprocessing` passed to `save`.
        extra: the `extra` passed to `save`; for a checkpoint, the info of the run and its step.
        report: the result of a partial restore (`load(into=)`); None otherwise.
        trust: the packages that `load(trust=)` named.
    """

    params: dict
    state: dict
    reference: dict[str, Any] | None = None
    features: Learned | None = None
    classes: tuple[str, ...] | None = None
    preprocessing: Any = None
    extra: Any = None
    report: Report | None = field(default=None, repr=False)
    trust: tuple[str, ...] = field(default=(), repr=False)

    __repr__ = in_brief

    @property
    def model(self) -> Callable[..., Any]:
        """The model, a function of `(v, *inputs)`. Each access imports it by its reference.

        Raises CheckpointError if there is no reference, if it cannot be imported, or if its package is not trusted.
        """
        if self.reference is None:
            raise CheckpointError("this was saved without its model; call your own with its params and state")
        return model_reference.read(self.reference, self.trust)


def save(
    path: str | os.PathLike,
    params: dict,
    state: dict | None = None,
    *,
    model: Any = None,
    options: Mapping[str, Any] | None = None,
    features: Mapping[str, Feature] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Any = None,
    extra: Any = None,
) -> Path:
    """Write a model to the directory `path`, atomically.

    An existing artifact is replaced. With several processes, every process calls `save`, and the first one writes.

    Args:
        path: the directory to write.
        params: the parameters, nested dicts of arrays.
        state: the model state, nested dicts of arrays; None for a model without state.
        model: the model as passed to `sw.apply`: a top-level function, a `Layer`, a method of a recipe, or the name of
            one of these as "package.module:name". None saves the arrays without a model.
        options: keyword arguments or fields of a model that is named by a string.
        features: what training learned of its data, `TrainState.features`.
        classes: the class names; by default those of the feature "label".
        preprocessing: any value that JSON can hold.
        extra: any value that JSON can hold.

    Returns:
        The absolute path of the directory.

    Raises:
        ConfigError: the model cannot be imported by its name, JSON cannot hold a value, `params` or `state` is not a
            tree of nested dicts of arrays, or `path` holds something that is not an artifact.
        CheckpointError: the directory cannot be written.

    >>> import tempfile
    >>> from sapwood import layers as L
    >>> path = save(tempfile.mkdtemp() + "/model", {"kernel": jnp.ones((2, 3))}, model=L.Dense(3, bias=False))
    >>> artifact = load(path)
    >>> artifact.model(artifact.params, jnp.ones((1, 2)))
    Array([[2., 2., 2.]], dtype=float32)
    """
    path = Path(path).expanduser().absolute()
    if path.exists() and not (path / ABOUT).exists() and not (path.is_dir() and not os.listdir(path)):
        raise ConfigError(f"{path} is there and is no saved model; choose another path")
    if not isinstance(params, dict) or not isinstance(state or {}, dict):
        raise ConfigError("params and state are nested dicts, as sw.init returns them")
    for kind, tree in (("params", params), ("state", state or {})):
        _check_names(kind, tree)
    named = named_leaves({"params": params, "state": state or {}})
    if classes is None and features is not None and "label" in features:
        classes = features["label"].classes
    arrays = {name: array_bits.as_array(name, leaf) for name, leaf in named.items()}
    marks = digests(arrays)
    about = {
        "format": _FORMAT,
        "digest": RULE,
        "arrays": {name: [*describe(x), marks[name]] for name, x in arrays.items()},
        "model": None if model is None else model_reference.write(model, options),
        "features": None if features is None else Learned(features).to_json(),
        "classes": None if classes is None else [str(name) for name in classes],
        "preprocessing": preprocessing,
        "extra": extra,
    }
    try:
        text = checksummed_json.seal(about)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"preprocessing= and extra= must be what JSON can hold: {error}") from error
    if len(text) > checksummed_json.MOST:
        raise ConfigError(
            f"what stands beside the weights has {len(text):,} bytes, and at most {checksummed_json.MOST:,} are read "
            "back; preprocessing= and extra= are no place for data"
        )
    host = {name: _fetch(array_bits.encode(x)) for name, x in arrays.items() if x.size}
    if jax.process_index() == 0:
        try:
            _write(path, host, text)
        except Exception as error:  # safetensors raises its own exception for a full disk
            raise CheckpointError(f"{path} could not be written: {error}") from error
    return path


def _check_names(where: str, tree: Any) -> None:
    """Raise ConfigError for a tree that would change by saving and loading it.

    Each name must be a non-empty string without a slash, and each leaf must be an array.
    """
    for name, x in tree.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise ConfigError(
                f"{where} cannot hold the name {name!r}: a name is a string, is not empty and holds no slash, which "
                'stands between names; nest dicts instead: {"a": {"b": x}} for "a/b"'
            )
        if isinstance(x, dict):
            _check_names(f"{where}/{name}", x)
        elif x is None or not jax.tree_util.all_leaves([x]):
            raise ConfigError(f"{where}/{name} is of type {type(x).__name__}; nested dicts of arrays are expected")


def _fetch(x: jax.Array) -> np.ndarray:
    if not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(jax.device_get(x), order="C")


def _write(path: Path, host: dict[str, np.ndarray], text: str) -> None:
    from safetensors.numpy import save_file

    part, old = path.with_name(path.name + ".part"), path.with_name(path.name + ".old")
    _clear(path, part, old)
    try:
        part.mkdir(parents=True)
        save_file(host, part / WEIGHTS, metadata={"format": "sapwood"})
        (part / ABOUT).write_text(text)
        (part / WEIGHTS).chmod((part / ABOUT).stat().st_mode)  # safetensors makes it readable by its owner only
        if path.exists():
            path.rename(old)
        part.rename(path)
    finally:
        _clear(path, part, old)


def _clear(path: Path, part: Path, old: Path) -> None:
    """Remove temporary directories of a write. If it stopped between its two renames, the old model is put back."""
    if old.exists() and not path.exists():
        old.rename(path)
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)


def load(
    path: str | os.PathLike,
    *,
    into: tuple[Any, Any] | None = None,
    match: Mapping[str, str | None] | None = None,
    key: Any = 0,
    step: int | str | None = None,
    trust: Trust = (),
) -> Artifact:
    """Read a model from an artifact that `save` wrote, from a run directory, or from the checkpoints of a run.

    From a run directory it reads the model saved at the end of the run. If that model is damaged, missing, or older
    than the checkpoints because the run has continued, it reads a checkpoint: the best one if the run keeps one
    (`fit(best="min:validation_loss")`), else the newest intact one. If training kept running means (`Trainer(ema=)`),
    it reads those, as evaluation does.

    The file is data: its arrays are verified by digest, and nothing in it is run. The model is imported only when
    `.model` is read. Imported code may do everything that you may, so a package other than Sapwood must be named in
    `trust`.

    Args:
        path: the directory of an artifact, a run, its checkpoints, or one checkpoint.
        into: a `Spec`, or a pair `(params, state)` of nested dicts of `Param`s, arrays or `jax.ShapeDtypeStruct`s. The
            arrays are loaded into this structure, with its shardings and its floating dtypes. An entry that nothing is
            loaded into keeps its value if it is an array, and is drawn with `key` if it is a `Param`; a
            `jax.ShapeDtypeStruct` must be loaded. None loads all arrays as they were saved.
        match: maps patterns of paths in the file to paths in `into`, such as `{"backbone/**": "encoder/**"}`. The first
            pattern that fits decides. None as a value leaves paths out: `{"head/**": None, "**": "**"}`. By default
            equal paths match.
        key: a `jax.random.key` or an integer seed, for `Param`s that are drawn.
        step: the checkpoint to read from a run: a number, "best" or "last". None reads as described above.
        trust: packages that the model may be imported from: a name such as "my_project", an imported package, or
            several of these.

    Returns:
        The `Artifact`. With `into`, its `report` lists the paths that were loaded, fresh and unused.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit `into`. A differing shape is an error and never
            skipped: exclude the path with `match` if it is meant to be fresh.
        ConfigError: a pattern of `match` has no effect, `match` is given without `into`, no path in the file equals a
            path in `into` and `match` is not given, or a `jax.ShapeDtypeStruct` of `into` is not loaded.

    >>> import tempfile
    >>> path = save(tempfile.mkdtemp() + "/model", {"backbone": {"w": jnp.ones(2)}, "head": {"w": jnp.ones((2, 9))}})
    >>> zeros = {"encoder": {"w": jnp.zeros(2)}, "head": {"w": jnp.zeros((2, 4))}}
    >>> artifact = load(path, into=(zeros, {}), match={"backbone/**": "encoder/**"})
    >>> artifact.report
    loaded 1 of 2 arrays, 1 of them from another path
      fresh: head/w
      unused: head/w
    """
    names = trusted(trust)
    source = _open(Path(path).expanduser(), step)
    if into is None:
        if match is not None:
            raise ConfigError("match= says what goes where in into=; give into= too")
        arrays, about = source.read(source.structs)
        return Artifact(*_trees(arrays), **about, trust=names)
    params, state, about, report = _into(source, Spec(*into), match, key, path)
    return Artifact(params, state, **about, report=report, trust=names)


class _Source(NamedTuple):
    """A source that `load` reads from.

    Args:
        structs: shape, dtype and default sharding of each array by path, such as "params/stem/kernel".
        read: a function that reads the arrays of the structs it gets, with their shardings. It returns the arrays by
            path, and the other fields of the `Artifact` by name.
    """

    structs: dict[str, jax.ShapeDtypeStruct]
    read: Callable[[dict[str, jax.ShapeDtypeStruct]], tuple[dict[str, jax.Array], dict[str, Any]]]


def _open(path: Path, step: int | str | None) -> _Source:
    if step is None and (path / ABOUT).exists():
        return _open_artifact(path)
    if path.name.isdecimal() and int(path.name) in Checkpoints(path.parent).steps() and step is None:
        return _open_checkpoints(Checkpoints(path.parent), int(path.name))
    if step is None and (path / "model").is_dir():
        return _open_ended(path)
    for directory in (path / "checkpoints", path):
        if Checkpoints(directory).latest() is not None:
            return _open_checkpoints(Checkpoints(directory), step)
    what = "is not there" if not path.exists() else "is neither a saved model, a run nor a checkpoint"
    if step is not None and path.exists():
        what = f"holds no checkpoints, of which step={step!r} could be one"
    raise CheckpointError(f"{path} {what}")


def _open_ended(run: Path) -> _Source:
    """The model saved at the end of a run.

    If the run has continued since, or the model is damaged, it falls back to the run's checkpoints with a warning.
    """
    model, checkpoints = run / "model", Checkpoints(run / "checkpoints")

    def instead(why: object) -> _Source:
        warnings.warn(f"{why}: its checkpoints are read, which hold no model", stacklevel=5)
        return _open_checkpoints(checkpoints, None)

    def read(structs: dict[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        try:
            return whole.read(structs)
        except CheckpointError as error:
            if checkpoints.latest() is None or not structs.keys() <= (other := instead(error)).structs.keys():
                raise
            return other.read(structs)

    try:
        if why := _overtaken(model, checkpoints):
            return instead(why)
        whole = _open_artifact(model)
    except CheckpointError as error:
        if checkpoints.latest() is None:
            raise
        return instead(error)
    return _Source(whole.structs, read)


def _overtaken(model: Path, checkpoints: Checkpoints) -> str | None:
    """A message if the run has continued after its model was saved, so that its checkpoints are newer; else None.

    A model of the best checkpoint may be older than the newest checkpoint.
    """
    extra, latest = _about(model).get("extra"), checkpoints.latest()
    saved = extra.get("step") if isinstance(extra, dict) else None
    if not isinstance(saved, int) or latest is None or saved >= latest or saved == checkpoints.best():
        return None
    return f"{model} is of step {saved} and the run has gone on to step {latest}"


def _about(path: Path) -> dict[str, Any]:
    """The content of `artifact.json`. The type of each part is checked.

    Parts that older versions did not write get their default. Raises CheckpointError if the file is damaged or was
    written by a newer Sapwood.
    """
    try:
        about = {"features": None, "digest": 1, **checksummed_json.read(path / ABOUT)}
        if any(isinstance(x := about.get(name), int) and x > ours for name, ours in _OURS.items()):
            raise CheckpointError(f"{path} was written by a newer Sapwood; update it")
        for name, fits in _KINDS.items():
            if not fits(about[name]):
                raise ValueError(f"{name!r} was not written by Sapwood")
        return about
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged: {ABOUT} lacks {error}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {ABOUT}: {error}") from error


def _described(arrays: Any) -> bool:
    """Whether `arrays` maps paths to `[dtype, shape, digest]`.

    An array with a dimension of size 0 takes no bytes in the file, so a small file could declare huge sizes for its
    other dimensions. The product of these other sizes may be at most `_EMPTY`.
    """

    def is_path(name: str) -> bool:
        names = name.split("/")
        inside = any("/".join(names[:n]) in arrays for n in range(1, len(names)))
        return names[0] in ("params", "state") and len(names) > 1 and not inside

    def fits(said: Any) -> bool:
        if not isinstance(said, list) or list(map(type, said)) != [str, list, str]:
            return False
        sizes = said[1]
        whole = len(sizes) <= _RANK and all(type(size) is int and size >= 0 for size in sizes)
        return whole and (0 not in sizes or math.prod(filter(None, sizes)) <= _EMPTY)

    return isinstance(arrays, dict) and all(is_path(name) and fits(said) for name, said in arrays.items())


_RANK, _EMPTY = 64, 1 << 20
_KINDS: dict[str, Callable[[Any], bool]] = {
    "format": lambda x: type(x) is int,
    "digest": lambda x: type(x) is int and x > 0,
    "arrays": _described,
    "model": lambda x: isinstance(x, dict | None),
    "features": lambda x: isinstance(x, dict | None),
    "classes": lambda x: x is None or (isinstance(x, list) and all(isinstance(name, str) for name in x)),
    "preprocessing": lambda x: True,
    "extra": lambda x: True,
}
"""The parts of `artifact.json`, each with a function that checks its type."""


def _open_artifact(path: Path) -> _Source:
    about = _about(path)
    arrays = about["arrays"]
    classes = None if about["classes"] is None else tuple(about["classes"])
    beside = {"reference": about["model"], "preprocessing": about["preprocessing"], "extra": about["extra"]}
    beside |= {"classes": classes, "features": _learned(about["features"], path)}
    try:
        structs = {name: array_bits.struct(dtype, shape) for name, (dtype, shape, _) in arrays.items()}
    except (TypeError, ValueError) as error:  # not the name of a dtype
        raise CheckpointError(f"{path} is damaged: {ABOUT}: {error}") from error

    def read(structs: dict[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        found = _read_weights(path, structs)
        after = digests(found, about["digest"])
        wrong = [name for name in found if after[name] != arrays[name][2]]
        if wrong:
            raise CheckpointError(f"{path} is damaged: {', '.join(wrong[:5])} read back other than saved")
        return found, beside

    return _Source(structs, read)


def _read_weights(path: Path, structs: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    from safetensors import safe_open

    found = {}
    try:
        if (path / WEIGHTS).exists() and not (path / WEIGHTS).is_file():
            raise ValueError("it is no file")  # reading a pipe would block
        with safe_open(path / WEIGHTS, framework="numpy") as file:
            for name, real in structs.items():
                stored = array_bits.stored_struct(real)
                array = file.get_tensor(name) if np.prod(real.shape) else np.zeros(stored.shape, stored.dtype)
                if describe(array) != describe(stored):
                    raise ValueError(f"{name} is no longer {array_bits.describe_type(*describe(stored))}")
                with jax.transfer_guard_host_to_device("allow"):  # loading a model asks for this transfer
                    placed = jax.make_array_from_callback(stored.shape, stored.sharding, array.__getitem__)
                found[name] = array_bits.decode(placed, real)
    except Exception as error:  # safetensors raises its own errors, OSError and ValueError for bad files
        raise CheckpointError(f"{path} is damaged: {WEIGHTS}: {error}") from error
    return found


def _open_checkpoints(checkpoints: Checkpoints, wanted_step: int | str | None) -> _Source:
    best = checkpoints.choose(wanted_step) if wanted_step in (None, "best") else None
    step = "best" if best is not None else wanted_step
    order, steps = checkpoints.order(step), checkpoints.steps()
    if not set(order) <= set(steps):
        raise CheckpointError(f"{checkpoints.directory} has no checkpoint of step {step}; it has {steps}")
    for candidate in order:
        try:
            contents = checkpoints.contents(candidate)
            break
        except CheckpointError:
            if candidate == order[-1]:
                raise
    wanted = {name: x for name, x in contents.items() if name.split("/")[0] in ("params", "state")}
    if not wanted:
        raise CheckpointError(f"the checkpoints in {checkpoints.directory} hold no params")
    there = {name: _averaged(name, contents) for name in wanted}

    def read(structs: dict[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        stored = {there[name]: _like(contents[there[name]], x) for name, x in structs.items()}
        nested = paths.nest((tuple(name.split("/")), x) for name, x in stored.items())
        tree, found = checkpoints.restore(nested, step=step, subset=True)  # falls back if it is damaged
        arrays, info = (
            named_leaves(tree),
            {name: x for name, x in found.info.items() if name not in ("identity", "rows")},
        )
        about = {
            "features": _learned(info.pop("features", None), checkpoints.directory),
            "extra": {**info, "step": found.step},
        }
        return {name: arrays[there[name]].astype(x.dtype) for name, x in structs.items()}, about

    return _Source(wanted, read)


def _averaged(name: str, contents: Mapping[str, Any]) -> str:
    """The path in a checkpoint of the array that evaluation uses: the running mean if there is one, else `name`."""
    kind, _, rest = name.partition("/")
    mean = f"{'ema' if kind == 'params' else 'ema_state'}/{rest}"
    return mean if mean in contents else name


def _learned(said: Any, path: Any) -> Learned | None:
    try:
        return None if said is None else Learned.from_json(said)
    except DataError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _trees(arrays: Mapping[str, Any]) -> tuple[dict, dict]:
    tree = paths.nest((tuple(name.split("/")), x) for name, x in arrays.items())
    return tree.get("params", {}), tree.get("state", {})


def _into(source: _Source, wanted: Spec, patterns: Mapping[str, str | None] | None, key: Any, path: Any) -> tuple:
    for kind, tree in wanted._asdict().items():
        _check_names(f"into= ({kind})", tree)
    leaves = {
        f"{kind}/{paths.join(where)}": leaf
        for kind, tree in wanted._asdict().items()
        for where, leaf in paths.leaves(tree)
    }
    pairs = _pairs(list(source.structs), list(leaves), patterns)
    _check_values(leaves, pairs)
    if not pairs and not patterns:
        raise ConfigError(
            f"nothing in {path} has a name of into=: it has {_some(source.structs)}, and into= has {_some(leaves)}; "
            'say what goes where with match={"there/**": "here/**"}'
        )
    targets = {here: array_bits.struct_of(here, leaves[here]) for here in pairs}
    _check(source, pairs, targets, path)
    placed = {there: _like(source.structs[there], targets[here]) for here, there in pairs.items()}
    arrays, about = source.read(placed)
    loaded = {here: arrays[there].astype(targets[here].dtype) for here, there in pairs.items()}
    params, state = _trees(_fresh(leaves, loaded, key) | loaded)
    report = Report(
        {_bare(here): _bare(there) for here, there in pairs.items()},
        tuple(_bare(here) for here in leaves if here not in pairs),
        tuple(_bare(there) for there in source.structs if there not in pairs.values()),
    )
    return params, state, about, report


def _pairs(there: list[str], here: list[str], patterns: Mapping[str, str | None] | None) -> dict[str, str]:
    """Map each path of `here` that is loaded to the path of `there` that it is loaded from.

    `match` pairs the paths without "params/" or "state/", so one pattern serves parameters and state. The paths in the
    result are full: each has the prefix that it has in `here` or `there`.
    """
    kinds = {_bare(name): name.split("/")[0] for name in here}
    same = [_bare(name) for name in there]
    found = match(same, [_bare(name) for name in here], patterns)
    full = dict(zip(same, there, strict=True))
    return {f"{kinds[target]}/{target}": full[path] for target, path in found.items()}


def _bare(name: str) -> str:
    return name.split("/", 1)[1]


def _some(names: Iterable[str]) -> str:
    return first_names([_bare(name) for name in names], quote=False) or "nothing"


def _check_values(leaves: dict[str, Any], pairs: dict[str, str]) -> None:
    empty = [name for name, x in leaves.items() if name not in pairs and isinstance(x, jax.ShapeDtypeStruct)]
    if empty:
        raise ConfigError(f"nothing is loaded into {', '.join(map(_bare, empty[:5]))}, and into= has no value for it")


def _like(saved: jax.ShapeDtypeStruct, target: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=target.sharding)


def _check(source: _Source, pairs: dict[str, str], targets: dict[str, jax.ShapeDtypeStruct], path: Any) -> None:
    wrong = []
    for here, there in pairs.items():
        saved, target = source.structs[there], targets[here]
        floating = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (saved, target))
        if saved.shape != target.shape or not (floating or saved.dtype == target.dtype):
            kinds = array_bits.describe_type(*describe(saved)), array_bits.describe_type(*describe(target))
            wrong.append(f"{_bare(there)} is {kinds[0]} there and {_bare(here)} is {kinds[1]} here")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{path} does not fit: {'; '.join(wrong[:5])}{more}; leave a path out with match={{path: None, '**': '**'}}"
        )


def _fresh(leaves: dict[str, Any], loaded: dict[str, jax.Array], key: Any) -> dict[str, jax.Array]:
    """Every entry in the order of `into`: loaded arrays, drawn `Param`s, and values that `into` keeps."""
    drawn = {name: leaf for name, leaf in leaves.items() if name not in loaded and isinstance(leaf, Param)}
    params, state = draw(Spec(*_trees(drawn)), as_key(key)) if drawn else ({}, {})
    born = named_leaves({"params": params, "state": state})
    return {name: loaded[name] if name in loaded else born.get(name, leaf) for name, leaf in leaves.items()}

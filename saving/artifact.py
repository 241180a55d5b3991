"""Artifacts: a trained model as a portable directory, written by `sw.save` and read, whole or in part, by `sw.load`.

`weights.safetensors` holds the arrays by path, in the format that the field exchanges weights in (the `safetensors`
package: a few kB of code that cannot run any). `artifact.json` holds the rest under a checksum: which function the
model is and its options, what it learned of its features, the class names, the preprocessing, and a digest for each
array.
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
from sapwood.core.messages import some
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
_FORMAT = 2  # 1: up to 0.1, whose digests are of rule 1
_OURS = {"format": _FORMAT, "digest": RULE}


@dataclass(frozen=True)
class Artifact:
    """A model from disk: nested dicts `params` and `state`, and what was saved beside them.

    `reference` names the model and its options; `model` imports it, from Sapwood or from a package that `sw.load` was
    told to `trust`. `features` is what training learned of its data: `Dataset.held_to` holds other data to it. `report`
    says what a partial restore did.
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
        """The model, a function of `(v, *inputs)`, imported now. CheckpointError where it cannot be, and where it is of
        a package that is not trusted."""
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
    """Write a model to the directory `path`, which appears whole or not at all, and return the path.

    `model` is what `sw.apply` is given: a top-level function, a `Layer`, a method of a recipe, or one of these by name,
    "package.module:name", with its `options`. `features` is what training learned of its data, `TrainState.features`;
    `classes` are those of its "label" unless others are given. `preprocessing` and `extra` are anything that JSON
    holds. An artifact that is there already is replaced. On several processes all of them call it, and the first one
    writes.

    Raises ConfigError for a model that cannot be imported by name, for what JSON cannot hold, and where `path` holds
    something else; CheckpointError where it cannot be written.

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
        except Exception as error:  # safetensors has an exception of its own for a full disk
            raise CheckpointError(f"{path} could not be written: {error}") from error
    return path


def _check_names(where: str, tree: Any) -> None:
    """ConfigError for what would come back as another tree: a name is a string without a slash, a leaf an array."""
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
        (part / WEIGHTS).chmod((part / ABOUT).stat().st_mode)  # safetensors lets nobody else read it
        if path.exists():
            path.rename(old)
        part.rename(path)
    finally:
        _clear(path, part, old)


def _clear(path: Path, part: Path, old: Path) -> None:
    """Remove what a write leaves; where it ended between its two renames, the old model is back in its place."""
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
    """Read a model from what `save` wrote, from a run directory, or from a run's checkpoints.

    Of a run that is the model that was saved at its end, unless that is damaged or the run has gone on since. Else it
    is its best checkpoint where it keeps one (`fit(best="min:validation_loss")`), else the newest that is whole.
    `step` names another one: a number, "best" or "last". Where training kept running means (`Trainer(ema=)`), those
    are read, which evaluation uses, too.

    With `into`, a `Spec` or any pair `(params, state)` of nested dicts of `Param`, arrays or `jax.ShapeDtypeStruct`,
    the arrays are brought into that structure, onto its shardings and into its floating dtypes. `match` maps patterns
    of paths in the file to paths in `into`: `{"backbone/**": "encoder/**"}`; the first that fits decides, None leaves
    out: `{"head/**": None, "**": "**"}`. What nothing is loaded into stays as it is where `into` has arrays and is
    drawn with `key` where it has `Param`s. The result's `report` lists what was loaded, what is fresh, what is unused.
    Where that is nothing at all, without a `match` that says so, it is an error.

    A shape that differs is an error, never a skip: leave the path out of `match` if it is meant to be fresh. The file
    is data: it is checked by digest, and nothing in it is run. Its model is imported when `.model` is asked for: one of
    Sapwood's layers or models at once, one of another package only where `trust` names that package, as in
    `trust="my_project"` (or several, or the imported package itself): what is imported may do all that you may.

    Raises CheckpointError for a missing, damaged or unfitting file; ConfigError for a `match` that does nothing.

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
    """Something to load from: its arrays by path ("params/stem/kernel"), and how to read some, with what is beside."""

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
    """The model that was saved at the end of a run; its checkpoints where it has gone on since or the model is damaged,
    which is said."""
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
    """That a run has gone on since its model was saved: its checkpoints are newer. None where it has not."""
    extra, latest = _about(model).get("extra"), checkpoints.latest()
    saved = extra.get("step") if isinstance(extra, dict) else None
    if not isinstance(saved, int) or latest is None or saved >= latest or saved == checkpoints.best():
        return None
    return f"{model} is of step {saved} and the run has gone on to step {latest}"


def _about(path: Path) -> dict[str, Any]:
    """What stands beside the weights, each part of the kind that `save` writes; what an older one lacks is None."""
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
    """Whether this maps paths to dtype, shape and digest. An array without elements may have no huge dimension: what
    the file says costs it nothing there."""

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
"""What `save` writes beside the weights, and whether something is of that kind."""


def _open_artifact(path: Path) -> _Source:
    about = _about(path)
    arrays = about["arrays"]
    classes = None if about["classes"] is None else tuple(about["classes"])
    beside = {"reference": about["model"], "preprocessing": about["preprocessing"], "extra": about["extra"]}
    beside |= {"classes": classes, "features": _learned(about["features"], path)}
    try:
        structs = {name: array_bits.struct(dtype, shape) for name, (dtype, shape, _) in arrays.items()}
    except (TypeError, ValueError) as error:  # no dtype
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
            raise ValueError("it is no file")  # a pipe would be waited for
        with safe_open(path / WEIGHTS, framework="numpy") as file:
            for name, real in structs.items():
                stored = array_bits.stored_struct(real)
                array = file.get_tensor(name) if np.prod(real.shape) else np.zeros(stored.shape, stored.dtype)
                if describe(array) != describe(stored):
                    raise ValueError(f"{name} is no longer {array_bits.kind(*describe(stored))}")
                with jax.transfer_guard_host_to_device("allow"):  # who loads a model asks for that
                    placed = jax.make_array_from_callback(stored.shape, stored.sharding, array.__getitem__)
                found[name] = array_bits.decode(placed, real)
    except Exception as error:  # safetensors raises its own, OSError and ValueError for what a file can be
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
        tree, found = checkpoints.restore(nested, step=step, subset=True)  # another one where that is damaged
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
    """Where a checkpoint has what evaluation uses: the running mean, where it keeps one."""
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
    targets = {here: array_bits.as_struct(here, leaves[here]) for here in pairs}
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
    """`match` over the bare paths, so that one pattern serves parameters and state; each stays what it is."""
    kinds = {_bare(name): name.split("/")[0] for name in here}
    same = [_bare(name) for name in there]
    found = match(same, [_bare(name) for name in here], patterns)
    full = dict(zip(same, there, strict=True))
    return {f"{kinds[target]}/{target}": full[path] for target, path in found.items()}


def _bare(name: str) -> str:
    return name.split("/", 1)[1]


def _some(names: Iterable[str]) -> str:
    return some([_bare(name) for name in names], quote=False) or "nothing"


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
            kinds = array_bits.kind(*describe(saved)), array_bits.kind(*describe(target))
            wrong.append(f"{_bare(there)} is {kinds[0]} there and {_bare(here)} is {kinds[1]} here")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{path} does not fit: {'; '.join(wrong[:5])}{more}; leave a path out with match={{path: None, '**': '**'}}"
        )


def _fresh(leaves: dict[str, Any], loaded: dict[str, jax.Array], key: Any) -> dict[str, jax.Array]:
    """Every entry in `into`'s order: what stays as it is, and what is drawn; loaded ones are written over it."""
    drawn = {name: leaf for name, leaf in leaves.items() if name not in loaded and isinstance(leaf, Param)}
    params, state = draw(Spec(*_trees(drawn)), as_key(key)) if drawn else ({}, {})
    born = named_leaves({"params": params, "state": state})
    return {name: loaded[name] if name in loaded else born.get(name, leaf) for name, leaf in leaves.items()}

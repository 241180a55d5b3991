"""Run identity: a description of trainer and data that a checkpoint stores, and that a resumed run is compared with.

`identity` makes the description: nested JSON dicts from a part ("callbacks", "data", or a field of the trainer) to a
path to a text. Paths that start with "code." hold digests of the user's own functions. `changes` lists the differences
of two descriptions in words. `require_same` raises for differences, unless the caller accepts them with
``resume="anyway"``.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sapwood.core.errors import ConfigError
from sapwood.data.dataset import Dataset
from sapwood.train.config import Config
from sapwood.train.record.describe_settings import describe

SAMPLED = 8
"""Number of examples that `digest_sample` reads to recognize a data set."""

_ELSEWHERE = ("mesh", "rules", "offload", "jit", "checks", "learning_rate")  # how it runs, or only logged
ANYWAY = "anyway"
"""Value of `fit(resume=)` that accepts every change."""


def identity(trainer: Config, data: Dataset, validation: Dataset | None, callbacks: Sequence[Any]) -> dict[str, Any]:
    """Describe everything that decides the numbers of a run, as JSON-compatible nested dicts.

    Of each data set only `SAMPLED` examples are read. Callbacks are included if they are dataclasses. Two things are
    not seen: the code of libraries, and what the user's own code reaches other than by name.

    Args:
        trainer: the `Trainer`. All its fields count, except those in `_ELSEWHERE`.
        data: the training data.
        validation: the validation data, or None.
        callbacks: the callbacks of `fit`.

    Returns:
        A dict from each part to its texts by path. "python" maps to the interpreter's cache tag, such as "cpython-313".
    """
    fields = [field.name for field in dataclasses.fields(trainer) if field.name not in _ELSEWHERE]
    parts = {name: describe(getattr(trainer, name)) for name in fields}
    parts["callbacks"] = describe([x for x in callbacks if dataclasses.is_dataclass(x)])
    for name, one in (("data", data), ("validation", validation)):
        parts[name] = {} if one is None else {"examples": str(len(one)), **digest_sample(one)}
    parts["jax_enable_x64"] = {"": str(jax.config.jax_enable_x64)}  # type: ignore[attr-defined]
    return {"python": f"{sys.implementation.cache_tag}", **parts}


def model_changes(old: Mapping[str, Any] | None, trainer: Config) -> list[str]:
    """List in words how the trainer's model, loss, metrics and policy differ from a checkpoint's identity ``old``."""
    parts = {name: describe(getattr(trainer, name)) for name in ("objective", "policy")}
    return changes(old, {"python": f"{sys.implementation.cache_tag}", **parts})


def describe_callback(callback: Any) -> dict[str, str]:
    """Describe a callback, so that a resumed run can tell whose saved memory is whose.

    A dataclass is described by its name and its options, any other callback by its name.

    >>> from sapwood.train.callbacks import StopAt
    >>> describe_callback(StopAt("accuracy", 0.9))
    {'': 'sapwood:StopAt', 'monitor': "'accuracy'", 'target': '0.9', 'mode': "'max'"}
    """
    parts, whole = describe(callback), dataclasses.is_dataclass(callback)
    return {path: text for path, text in parts.items() if not path or (whole and not path.startswith("code."))}


def digest_sample(data: Dataset) -> dict[str, str]:
    """Digest `SAMPLED` examples of a data set, entry by entry, evenly spaced over its own order.

    The examples are read twice. An entry that differs the second time is left out.

    Returns:
        A dict from the name of each entry to a text of its dtype, shape and digest.

    >>> import sapwood.data
    >>> one, other = (sapwood.data.load({"x": np.arange(9), "y": np.arange(9) * k}) for k in (1, 2))
    >>> [name for name in digest_sample(one) if digest_sample(one)[name] != digest_sample(other)[name]]
    ['y']
    """
    places = np.unique(np.linspace(0, len(data) - 1, SAMPLED).astype(int))
    once, again = (data.gather(places) for _ in range(2))
    marks = {name: (_mark(x), _mark(again[name])) for name, x in once.items()}
    return {name: one for name, (one, other) in marks.items() if one == other}


def _mark(x: np.ndarray) -> str:
    """Return dtype, shape and digest of an array as a text."""
    bits = repr(x.tolist()).encode() if x.dtype == object else np.ascontiguousarray(x).tobytes()
    return f"{x.dtype}{list(x.shape)} {hashlib.blake2b(bits, digest_size=8).hexdigest()}"


def changes(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[str]:
    """List in words the differences between an earlier identity ``old`` and the present one ``new``.

    Parts that ``old`` lacks are not compared. If ``old`` is not a mapping, the list is empty.

    >>> changes({"python": "", "clip": {"": "1.0"}}, {"python": "", "clip": {"": "2.0"}, "ema": {"": "None"}})
    ['clip was 1.0 and is now 2.0']
    """
    if not isinstance(old, Mapping):
        return []
    found = []
    for part, texts in new.items():
        if part == "python" or part not in old or texts == old[part]:
            continue
        if not isinstance(old[part], Mapping) or not all(isinstance(text, str) for text in old[part].values()):
            found.append(f"what it says of its {part} was not written by Sapwood")
            continue
        found += _changed(part, old[part], texts, old.get("python") == new["python"])
    return found


def _changed(part: str, old: dict[str, str], new: dict[str, str], same_python: bool) -> list[str]:
    """List the differences of one part in words."""
    if part in ("data", "validation"):
        if old.get("examples") != new.get("examples"):
            return [_data(part, "examples", old.get("examples"), new.get("examples"))]
        both = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return [_data(part, name, old.get(name), new.get(name)) for name in both]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    values = [name for name in names if not name.startswith("code.")]
    code = [name for name in names if name.startswith("code.") and _counts(name, old, new)]
    if not values and not same_python:  # another Python version compiles the same source to other bytecode
        return []
    named = [_value(part, name, old, new) for name in values if not any(name.startswith(f"{x}.") for x in values if x)]
    return named or [_code(part, name, old, new) for name in code]


def _counts(name: str, old: dict[str, str], new: dict[str, str]) -> bool:
    """Return True if a difference at this path of "code." is reported.

    Digests of functions, and constants that both sides have, are always reported. A constant that only one side has is
    normally skipped: the code that refers to it has changed, and that is reported already. It is reported if it is an
    item of a container that both sides have.
    """
    if (name in old and name in new) or old.get(name, new.get(name, "")).startswith("code "):
        return True
    outer = name.rpartition(".")[0]
    return outer in old and outer in new and not new[outer].startswith("code ")


def _value(part: str, name: str, old: dict[str, str], new: dict[str, str]) -> str:
    """Describe a changed setting by its own name and that of the object that holds it."""
    outer, _, last = name.rpartition(".")
    holder = new.get(outer, old.get(outer, "")).rpartition(":")[2].partition(".<locals>")[0] if outer else ""
    what = f"{part}: {last} of {holder}" if holder else f"{part}{f': {name}' if name else ''}"
    was, now = (_plain(texts.get(name, "not there")) for texts in (old, new))
    return f"{what} was {was} and is now {now}"


def _code(part: str, name: str, old: dict[str, str], new: dict[str, str]) -> str:
    """Describe a changed function, or a changed constant that a function refers to."""
    called = name.removeprefix("code.")
    was, now = (texts.get(name, "not there") for texts in (old, new))
    if not old.get(name, now).startswith("code "):  # a constant that the code refers to
        return f"{part}: {called} was {was} and is now {now}"
    state = "is another" if name in old and name in new else "is new" if name in new else "is no longer used"
    return f"{part}: the code of {called} {state}"


def _plain(text: str) -> str:
    """Return the outer function's name if the text names a local function, and the text itself otherwise."""
    return text.rpartition(":")[2].partition(".<locals>")[0] if ".<locals>" in text else text


def _data(part: str, name: str, old: str | None, new: str | None) -> str:
    """Describe a changed data set, by its number of examples or by one of its entries."""
    where = "the data" if part == "data" else "the validation data"
    if name == "examples":
        return f"{where} had {old or 'no'} examples and now {new or 'none'}"
    if old is None or new is None:
        return f"{where} had {'no' if old is None else 'an'} entry {name!r} and now {'one' if new else 'none'}"
    (kind, _, was), (other, _, now) = old.rpartition(" "), new.rpartition(" ")
    said = (kind, other) if kind != other else (was, now)
    return f"{where} are others: {SAMPLED} examples of {name!r} were {said[0]} and are now {said[1]}"


def require_same(run: Any, old: Mapping[str, Any] | None, new: Mapping[str, Any], resume: bool | str) -> list[str]:
    """Compare the identity of a run with that of its checkpoint, and return the differences that the user accepts.

    Args:
        run: directory of the run, for the message.
        old: identity in the checkpoint, or None if it has none.
        new: identity now.
        resume: the option of `fit`; "anyway" accepts all differences.

    Returns:
        The differences in words, as `changes` lists them.

    Raises:
        ConfigError: there are differences, and ``resume`` is not "anyway".
    """
    found = changes(old, new)
    if found and resume != ANYWAY:
        more = f", and {len(found) - 4} more" if len(found) > 4 else ""
        raise ConfigError(
            f"{run} cannot go on as another run: {', '.join(found[:4])}{more}. Give what it began with, or "
            'resume="anyway" (--resume anyway) to go on all the same'
        )
    return found

"""`Learned`: the features of the training data, and the conversion of a later data set to them.

A model knows class numbers, column positions and token ids, but a later data set may number them differently.
`convert_feature` compares the features of both sides and returns the functions that convert values, matching by name.
In the code `here` is the feature of the later data set and `there` that of training.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sapwood.core.errors import DataError
from sapwood.data.feature import RAW, TEXT, Feature

MOST = 12  # names that a message lists
COUNTED = 1 << 20  # at most so many unnamed classes are matched one by one

Turn = Callable[[np.ndarray], np.ndarray]


class Learned(Mapping[str, Feature]):
    """A mapping from entry to `Feature` of the training data: its classes, columns, ranges and vocabulary.

    It is immutable and hashable, so a `TrainState` carries it through JAX's transforms as static metadata.

    Example:
        >>> learned = Learned({"label": Feature((), "int32", classes=("cat", "dog"))})
        >>> learned["label"].classes, Learned.from_json(learned.to_json()) == learned
        (('cat', 'dog'), True)
    """

    def __init__(self, features: Mapping[str, Feature]):
        self._features = dict(features)
        self._hash = hash(frozenset(self._features.items()))

    def __getitem__(self, name: str) -> Feature:
        return self._features[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._features)

    def __len__(self) -> int:
        return len(self._features)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Learned) and self._features == other._features)

    def __repr__(self) -> str:
        return f"Learned({self._features})"

    def to_json(self) -> dict[str, Any]:
        """Each feature as JSON types; `Learned.from_json` reads them back."""
        return {name: feature.to_json() for name, feature in self.items()}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Learned":
        """The mapping that `to_json` described. `DataError`, naming the entry, for anything it does not write."""
        if not isinstance(said, Mapping):
            raise DataError(f"features are an object of JSON, not {said!r:.40}")
        found = {}
        for name, feature in said.items():
            try:
                found[name] = Feature.from_json(feature)
            except DataError as error:
                raise DataError(f"the feature {name!r}: {error}") from error
        return cls(found)


def convert_feature(name: str, here: Feature, there: Feature, data: Any) -> tuple[Feature, list[Turn]]:
    """The feature of an entry after its conversion to training's, and the functions that convert its values, in order.

    `Dataset.held_to` calls it for each entry whose features differ.

    Args:
        name: the entry.
        here: its feature in `data`.
        there: its feature in training.
        data: the data set that is converted. The values of the entry are read only if it has a class that training did
            not have.

    Raises:
        DataError: the values cannot be converted.
    """
    if RAW in (here.dtype, there.dtype) or there.dtype == TEXT:  # no device takes it, so no model depends on it
        return here, []
    _same_range(name, here, there)
    shape, turns = here.shape, []
    if here.columns is not None and there.columns is not None and here.columns != there.columns:
        places = _places(name, here.columns, there.columns, data.features)
        turns.append(lambda values: values[..., places])
        shape = (*shape[:-1], len(places))
    elif there.columns is not None and here.columns is None and shape[-1:] != (len(there.columns),):
        raise DataError(f"{name} has shape {shape} here, and training had the columns {_said(there.columns)}")
    turns += _renumbered(name, here, there, data)
    if channels_differ(name, here, there):
        turns.append(_in_color(name, here, there))
        shape = (*shape[:-1], there.shape[-1])
    if {here.dtype, there.dtype} & {"uint8"} and ("float" in here.dtype or "float" in there.dtype):
        raise DataError(
            f"{name} is {here.dtype} here and was {there.dtype} in training: scale it with `map` as it was there"
        )
    turns.append(lambda values: _as_type(name, values, np.dtype(there.dtype)))
    if there.classes is None and here.classes is None:  # class numbers are unchanged; this data may have more classes
        counts = [n for n in (here.num_classes, there.num_classes) if n is not None]
        there = replace(there, num_classes=max(counts) if len(counts) == 2 else None)
    return replace(there, shape=shape), turns


def channels_differ(name: str, here: Feature, there: Feature) -> bool:
    """Whether both features are images `(height, width, channels)` whose numbers of channels differ."""
    pictures = name == "image" or all(f.dtype == "uint8" and (f.low, f.high) == (0, 255) for f in (here, there))
    ours, theirs = here.shape[2:], there.shape[2:]
    return pictures and len(ours) == len(theirs) == 1 and None not in (*ours, *theirs) and ours != theirs


def _in_color(name: str, here: Feature, there: Feature) -> Turn:
    """The function that repeats one channel to three; `DataError` for other numbers of channels."""
    ours, theirs = here.shape[-1], there.shape[-1]
    if (ours, theirs) != (1, 3):
        raise DataError(
            f"{name} has {ours} channel{'s' * (ours != 1)} here and had {theirs} in training; bring it there with `map`"
        )
    return lambda values: np.repeat(values, 3, axis=-1)  # as `decode_image` reads a gray image in color


def _same_range(name: str, here: Feature, there: Feature) -> None:
    """Raise `DataError` if both features have a range and the ranges differ."""
    ours, theirs = (here.low, here.high), (there.low, there.high)
    if (None, None) not in (ours, theirs) and ours != theirs:
        ours, theirs = (f"{'' if low is None else low}..{'' if high is None else high}" for low, high in (ours, theirs))
        raise DataError(
            f"{name} has the range {ours} here and had {theirs} in training: bring it there with `map` and `declare` it"
        )


def _places(name: str, here: tuple[str, ...], there: tuple[str, ...], entries: Mapping[str, Feature]) -> list[int]:
    """The position here of each column of training; `DataError` if one is missing."""
    missing = [column for column in there if column not in here]
    if missing:
        text = [column for column in missing if column in entries]
        said = f" ({_said(text)} is there, but holds no single numbers)" if text else ""
        raise DataError(
            f"{name} has no column {_said(missing)} here{said}: training had {_said(there)}, here are {_said(here)}"
        )
    return [here.index(column) for column in there]


def _names(feature: Feature) -> tuple[str, ...] | None:
    """The names of an entry's classes, or its tokens, in order. Classes without names are named by their numbers.

    None if the entry has neither classes nor a vocabulary, or more than `COUNTED` classes without names.
    """
    if feature.vocabulary is not None or feature.num_classes is None:
        return feature.vocabulary
    if feature.classes is None and feature.num_classes > COUNTED:
        return None
    return tuple(feature.name(i) for i in range(feature.num_classes))


def _renumbered(name: str, here: Feature, there: Feature, data: Any) -> list[Turn]:
    """The functions that convert class numbers, token ids or text of `data` to the numbers of training.

    A number that training did not have becomes -1, which the check of the examples refuses.
    """
    own, known = _names(here), _names(there)
    named = here.dtype == TEXT or here.classes is not None or here.vocabulary is not None
    if known is None:
        if named:
            raise DataError(f"{name} is {_what(here)} here, and numbers without names in training: which is which?")
        return []
    number = {word: i for i, word in enumerate(known)}
    if here.dtype == TEXT:
        return [lambda values: _of_text(name, values, number)]
    if not named and there.classes is not None and any(word != str(i) for i, word in enumerate(known)):
        raise DataError(
            f"{name} is numbers here and had {_what(there)} in training: if they count those in that order, say so "
            "with classes= when it is loaded, or with `declare`"
        )
    if not named or own is None or own == known:
        return []
    _refuse_unknown(name, own, number, here, there, data)
    table = np.array([number.get(word, -1) for word in own])
    return [lambda values: np.where((values >= 0) & (values < len(table)), table[values % len(table)], -1)]


def _refuse_unknown(
    name: str, own: tuple[str, ...], number: Mapping[str, int], here: Feature, there: Feature, data: Any
) -> None:
    """Raise `DataError` if an example has a class that training did not have, or the vocabulary such a token."""
    strange = [i for i, word in enumerate(own) if word not in number]
    if not strange:
        return
    first, example = strange[0], ""
    if here.vocabulary is None:  # a declared class that no example has is no error
        values = data.column(name)
        found = np.argwhere(np.isin(values, strange))
        if not len(found):
            return
        first, example = values[tuple(found[0])], f" of {data.where(int(found[0][0]))}"
    raise DataError(
        f"{name}{example} is {own[first]!r}, which training did not know: it had {_what(there)}. Leave such examples "
        "out, or train with all that there can be (classes=, vocabulary=)"
    )


def _of_text(name: str, values: np.ndarray, number: Mapping[str, int]) -> np.ndarray:
    """The number of each text; `DataError` for a text without one."""
    for value in values.flat:
        if value not in number:
            raise DataError(f"{name} is {value!r}, which training did not know: it had {_said(number)}")
    return np.array([number[value] for value in values.flat]).reshape(values.shape)


def _as_type(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Convert values to the dtype of training; `DataError` if that changes a value by more than rounding of floats."""
    if values.dtype == dtype:
        return values
    with np.errstate(invalid="ignore", over="ignore"):
        made = values.astype(dtype)
    if "float" not in dtype.name and (wrong := made != values).any():
        raise DataError(
            f"{name} is {values.dtype.name} here, with {values[wrong][0]}, and was {dtype.name} in training; bring it "
            "to that with `map`"
        )
    return made


def _what(feature: Feature) -> str:
    """The classes, the vocabulary or "text", in words for a message."""
    if feature.dtype == TEXT:
        return "text"
    names = _names(feature) or ()
    if feature.vocabulary is not None:
        return f"a vocabulary of {len(names)}"
    return f"the classes {_said(names)}"


def _said(names: Iterable[str]) -> str:
    """The names, quoted, for a message: at most `MOST` of them."""
    quoted = [repr(name) for name in names]
    return ", ".join(quoted if len(quoted) <= MOST else [*quoted[: MOST - 1], f"... ({len(quoted)} in all)"])

"""What an entry of the data is (`Feature`), and the checks that hold each example to it."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.image.decode import is_picture, pixels

TEXT = "str"  # the dtype name of entries that hold Python strings, as object arrays
RAW = "object"  # any other Python object: it can be mapped, never put on a device


@dataclass(frozen=True)
class Feature:
    """One entry of every example: its shape, its type and what its values may be.

    Features travel with a `Dataset` and its batches; every example is checked against them when it is first
    read, so a wrong label stops at the data and not as a NaN, or silently clamped, inside the model.

    Args:
        shape: shape of one example's entry; `None` where it varies from example to example.
        dtype: NumPy name, or "str" for text.
        classes: names of the classes of a label, in order.
        num_classes: how many classes; taken from `classes` where those are given.
        low, high: smallest and largest value, both included.
        vocabulary: the tokens (for `characters`, the characters) that ids stand for, in order.
        columns: names along the last axis, for tables.
        finite: whether NaN and infinity are errors.

    Example:
        >>> Feature((), "int32", classes=("cat", "dog")).bounds
        (0, 1)
        >>> Feature((8, 8, 1), "uint8", low=0, high=16).scale(np.array([0, 8, 16], "uint8"))
        array([0. , 0.5, 1. ], dtype=float32)
    """

    shape: tuple[int | None, ...]
    dtype: str
    classes: tuple[str, ...] | None = None
    num_classes: int | None = None
    low: float | None = None
    high: float | None = None
    vocabulary: tuple[str, ...] | None = field(default=None, repr=False)
    columns: tuple[str, ...] | None = None
    finite: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(None if d is None else int(d) for d in self.shape))
        for name in ("num_classes", "low", "high"):
            if isinstance(value := getattr(self, name), np.generic):
                object.__setattr__(self, name, value.item())  # NumPy's numbers are no JSON
        for name in ("classes", "vocabulary", "columns"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(str(x) for x in getattr(self, name)))
        for name in ("classes", "vocabulary"):
            words = getattr(self, name) or ()
            if len(set(words)) < len(words):
                twice = next(word for word in words if words.count(word) > 1)
                raise ConfigError(f"{name} have {twice!r} twice; each is expected once")
        if self.classes is not None:
            if self.num_classes not in (None, len(self.classes)):
                raise ConfigError(f"num_classes is {self.num_classes}, but {len(self.classes)} classes are named")
            object.__setattr__(self, "num_classes", len(self.classes))
        if self.dtype not in (TEXT, RAW):
            try:
                object.__setattr__(self, "dtype", np.dtype(self.dtype).name)
            except TypeError:
                raise ConfigError(f"{self.dtype!r} is no dtype; say e.g. 'float32', 'int32' or 'str'") from None

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """Smallest and largest value that an entry may hold, from the classes, the vocabulary or the range."""
        size = self.num_classes if self.vocabulary is None else len(self.vocabulary)
        return (self.low, self.high) if size is None else (0, size - 1)

    def name(self, index: int) -> str:
        """The name of class `index`; its number where the classes have no names.

        >>> Feature((), "int32", classes=("cat", "dog")).name(1)
        'dog'
        """
        return str(int(index)) if self.classes is None else self.classes[int(index)]

    def scale(self, values: Any) -> Any:
        """Values as float32 in 0..1, by the declared range (by the dtype's for `uint8`).

        Works on NumPy and JAX arrays alike, so it can be used in a model or an objective, on the device.

        Raises:
            ConfigError: nothing says what the range is.
        """
        low, high = self.bounds
        if low is None or high is None:
            if self.dtype != "uint8":
                raise ConfigError(f"no range is declared to scale by: {self}; give low= and high=")
            low, high = 0, 255
        return (values.astype(np.float32) - np.float32(low)) / np.float32(high - low)

    def to_json(self) -> dict[str, Any]:
        """The fields that say something, as JSON types; `Feature.from_json` reads them back.

        >>> Feature((), "int32", num_classes=10).to_json()
        {'shape': [], 'dtype': 'int32', 'num_classes': 10}
        """
        said = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in said.items()}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Feature":
        """The feature that `to_json` described. DataError for what it cannot have written."""
        if not isinstance(said, Mapping):
            raise DataError(f"a feature is an object of JSON, not {said!r:.40}")
        for name, value in said.items():
            if name not in _WRITTEN or not _WRITTEN[name](value):
                raise DataError(f"a feature has no {name} {value!r:.40}")
        try:
            return cls(**said)
        except (ConfigError, TypeError) as error:
            raise DataError(f"this is no feature: {error}") from error


def _are(kind: type, values: Any) -> bool:
    """Whether this is a list of that type alone: True is no number."""
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _is_size(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


_WRITTEN: dict[str, Callable[[Any], bool]] = {
    "shape": lambda x: isinstance(x, list) and all(map(_is_size, x)),
    "dtype": lambda x: isinstance(x, str),
    "num_classes": lambda x: _is_size(x) and (x or 0) < 2**31,
    "finite": lambda x: isinstance(x, bool),
    **dict.fromkeys(("low", "high"), lambda x: x is None or type(x) in (int, float)),
    **dict.fromkeys(("classes", "vocabulary", "columns"), lambda x: x is None or _are(str, x)),
}
"""The fields of a feature as JSON, and whether a value is one that `to_json` writes."""


def infer(values: np.ndarray) -> Feature:
    """The feature of a stacked array `(examples, ...)`, as far as its shape and dtype tell.

    >>> infer(np.zeros((5, 8, 8), "float32")) == Feature((8, 8), "float32")
    True
    """
    if values.dtype == object:
        return Feature(values.shape[1:], TEXT if all(isinstance(v, str) for v in values.flat) else RAW)
    return Feature(values.shape[1:], TEXT if values.dtype.kind in "UST" else values.dtype.name)


def array(name: str, values: Any) -> np.ndarray:
    """`values` as an array; DataError, naming the entry, where they make none or hide something that one would lose."""
    plain = type(values) is np.ndarray or isinstance(values, np.generic | int | float)
    made = np.asarray(values) if plain else _read(name, values)
    if made.dtype.names:
        fields = ", ".join(made.dtype.names[:5])
        raise DataError(f"{name} has fields ({fields}); give each as an entry: {{n: x[n] for n in x.dtype.names}}")
    return made


def _read(name: str, values: Any) -> np.ndarray:
    if hasattr(values, "toarray") or hasattr(values, "todense"):
        kind = type(values).__name__
        raise DataError(f"{name} is a sparse {kind}; make it an array with its toarray() or todense()")
    if hasattr(values, "filled") and np.ma.is_masked(values):
        raise DataError(f"{name} has masked values, which no array keeps; fill them first, as filled(0) does")
    if isinstance(values, list | tuple) and any(map(is_picture, values[:1])):
        values = [pixels(value) for value in values]
    try:
        return np.asarray(pixels(values))
    except Exception as error:  # TypeError, RuntimeError, BufferError: whatever the values' own library raises
        if isinstance(error, ValueError) and isinstance(values, list | tuple):
            raise _uneven(name) from error
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name} is a {type(values).__name__} that NumPy cannot read: {cause}") from error


def _uneven(name: str) -> DataError:
    return DataError(
        f"{name} holds lists of several lengths, which make no array; pad them, or load a list of examples, whose "
        "shapes may vary"
    )


def rows(name: str, values: Any) -> np.ndarray:
    """`values` as an array `(examples, ...)`.

    Raises:
        DataError: they have no examples.
    """
    made = array(name, values)
    if made.ndim == 0:
        kind = made.dtype.name if made.dtype != object else type(values).__name__
        raise DataError(f"{name} is a single {kind}; an array with one row an example is expected")
    return made


def on_disk(values: Any) -> bool:
    """Whether an array lies in a file (`np.memmap`, or a view of one), so that a copy of it may not fit into memory."""
    while values is not None and not isinstance(values, np.memmap):
        values = getattr(values, "base", None)
    return values is not None


def narrow(name: str, values: Any, where: Callable[[int], str] | None = None) -> np.ndarray:
    """`values` as an array of a type the device has: in its order of bytes, float64 to float32 and int64 to int32
    unless JAX's 64-bit types are on. An integer that does not fit is an error here, where JAX would wrap it around
    without a word, which names the example by `where` if the first dimension counts those. Text becomes an array of
    Python strings."""
    values = array(name, values)
    if values.dtype.kind in "UST":
        return _strings(name, values)
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if values.dtype.kind not in "iuf" or values.dtype.itemsize < 8:
        return values
    from jax.dtypes import canonicalize_dtype

    dtype = np.dtype(canonicalize_dtype(values.dtype if values.dtype.itemsize == 8 else np.float64))
    if dtype.kind in "iu" and dtype != values.dtype and values.size:
        limits = np.iinfo(dtype)
        if values.min() < limits.min or values.max() > limits.max:
            first = tuple(np.argwhere((values > limits.max) | (values < limits.min))[0])
            holder = name if where is None or not first else f"{name} of {where(int(first[0]))}"
            raise DataError(
                f"{holder} holds {values[first]}, which does not fit {dtype.name}; map it to smaller numbers, or turn "
                "on JAX's 64-bit types with jax.config.update('jax_enable_x64', True)"
            )
    return values.astype(dtype, copy=False)


def _strings(name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "S":  # NumPy's bytes end at the first zero, so they were meant as text
        try:
            values = np.char.decode(values, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name} holds bytes that are no text ({error}); give UTF-8, or numbers, as np.frombuffer makes them"
            ) from error
    return values.astype(object)


def cast(
    name: str, feature: Feature, values: np.ndarray, entries: Sequence[int] | np.ndarray, where: Callable[[int], str]
) -> np.ndarray:
    """Stacked examples in the dtype of their feature; DataError where more changes than the rounding of a float.

    >>> cast("y", Feature((), "int32"), np.array([3, 2.5]), [0, 1], "example {}".format)
    Traceback (most recent call last):
    sapwood.core.errors.DataError: y of example 1 is 2.5; int32 is expected: give all examples one type, or `declare` it
    """
    dtype = np.dtype(feature.dtype)
    if is_ragged(values):
        made = np.empty(len(values), object)
        for i, value in enumerate(values):
            same = value.dtype == dtype
            made[i] = value if same else cast(name, feature, value[None], entries[i : i + 1], where)[0]
        return made
    expected = f"{dtype.name} is expected: give all examples one type, or `declare` it"
    if values.dtype == object:
        odd = [not isinstance(v, numbers.Number | np.generic) for v in values.flat]
        refuse(name, feature, values, np.reshape(odd, values.shape), expected, entries, where)
    with np.errstate(invalid="ignore", over="ignore"):
        made = values.astype(dtype)
    if not ("float" in dtype.name and "float" in values.dtype.name):
        refuse(name, feature, values, _comparable(made) != _comparable(values), expected, entries, where)
    return made


def _comparable(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) if values.dtype.kind == "V" else values  # bfloat16 and its kin


def refuse(name, feature: Feature, values, wrong: np.ndarray, expected: str, entries, where) -> None:
    if not wrong.any():
        return
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    row, *at = first
    place = f" at {tuple(at) if len(at) > 1 else at[0]}" if at else ""
    if at and feature.columns is not None:
        name, place = f"{name} column {feature.columns[at[-1]]!r}", ""
    others = int(wrong.reshape(len(wrong), -1).any(1).sum()) - 1
    more = f" (and {others} more like it in this batch)" if others else ""
    raise DataError(f"{name} of {where(int(entries[row]))} is {values[first]}{place}; {expected}{more}")


def is_ragged(values: np.ndarray) -> bool:
    """Whether these are arrays of several shapes, as `stack` keeps them: an object array of arrays."""
    return values.dtype == object and values.size > 0 and isinstance(values.flat[0], np.ndarray)

"""`Feature`: the shape, dtype and allowed values of one entry, and the conversion of values to arrays that fit it.

`array` and `to_device_dtype` turn values into NumPy arrays of dtypes that a device has, `cast` converts stacked
examples to the dtype of their feature, and `raise_first_wrong` raises the error that names the first wrong example.
"""

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.image.decode import is_picture, pixels

TEXT = "str"  # the dtype name of entries that hold Python strings, as object arrays
RAW = "object"  # the dtype name of any other Python objects: `map` takes them, a device does not


@dataclass(frozen=True)
class Feature:
    """One entry of every example: its shape, its dtype and the values it may have.

    A `Dataset` has a feature for each entry, and checks every example against it when the example is first read. So a
    wrong label raises an error at the data, instead of becoming a NaN or being clamped silently inside the model.

    Args:
        shape: shape of one example's entry; `None` for a dimension that varies between examples.
        dtype: NumPy name, "str" for text, or "object" for other Python objects.
        classes: names of the classes of a label, in order.
        num_classes: number of classes; default the number of `classes`.
        low: smallest allowed value, included; None for no limit.
        high: largest allowed value, included; None for no limit.
        vocabulary: the tokens (for `characters`, the characters) that ids stand for, in order.
        columns: names along the last axis, for tables.
        finite: whether NaN and infinity are errors.

    Raises:
        ConfigError: a class or token is there twice, `num_classes` is not the number of `classes`, or the dtype is
            unknown.

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
                object.__setattr__(self, name, value.item())  # JSON takes no NumPy numbers
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
        """Smallest and largest allowed value, from the classes, the vocabulary or the range."""
        size = self.num_classes if self.vocabulary is None else len(self.vocabulary)
        return (self.low, self.high) if size is None else (0, size - 1)

    def name(self, index: int) -> str:
        """The name of class `index`; its number as text if the classes have no names.

        >>> Feature((), "int32", classes=("cat", "dog")).name(1)
        'dog'
        """
        return str(int(index)) if self.classes is None else self.classes[int(index)]

    def scale(self, values: Any) -> Any:
        """Scale values from `bounds` to float32 in 0..1; `uint8` without bounds is scaled from 0..255.

        It takes NumPy and JAX arrays, so it also works in a model or an objective, on the device.

        Raises:
            ConfigError: there are no bounds, and the dtype is not `uint8`.
        """
        low, high = self.bounds
        if low is None or high is None:
            if self.dtype != "uint8":
                raise ConfigError(f"no range is declared to scale by: {self}; give low= and high=")
            low, high = 0, 255
        return (values.astype(np.float32) - np.float32(low)) / np.float32(high - low)

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON types; `Feature.from_json` reads them back.

        >>> Feature((), "int32", num_classes=10).to_json()
        {'shape': [], 'dtype': 'int32', 'num_classes': 10}
        """
        said = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in said.items()}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Feature":
        """The feature that `to_json` described. `DataError` for anything that `to_json` does not write."""
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
    """Whether this is a list whose values all have exactly that type, so that True is not an int."""
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _is_size(value: Any) -> bool:
    """Whether this is None or a non-negative int."""
    return value is None or (type(value) is int and value >= 0)


_WRITTEN: dict[str, Callable[[Any], bool]] = {
    "shape": lambda x: isinstance(x, list) and all(map(_is_size, x)),
    "dtype": lambda x: isinstance(x, str),
    "num_classes": lambda x: _is_size(x) and (x or 0) < 2**31,
    "finite": lambda x: isinstance(x, bool),
    **dict.fromkeys(("low", "high"), lambda x: x is None or type(x) in (int, float)),
    **dict.fromkeys(("classes", "vocabulary", "columns"), lambda x: x is None or _are(str, x)),
}
"""For each field of a feature, whether a JSON value is one that `to_json` writes."""


def infer(values: np.ndarray) -> Feature:
    """The feature that follows from the shape and dtype of a stacked array `(examples, ...)`.

    >>> infer(np.zeros((5, 8, 8), "float32")) == Feature((8, 8), "float32")
    True
    """
    if values.dtype == object:
        return Feature(values.shape[1:], TEXT if all(isinstance(v, str) for v in values.flat) else RAW)
    return Feature(values.shape[1:], TEXT if values.dtype.kind in "UST" else values.dtype.name)


def array(name: str, values: Any) -> np.ndarray:
    """`values` as a NumPy array.

    Raises `DataError`, naming the entry, for values that make no array, or that an array would lose a part of: sparse
    matrices, masked values, fields.
    """
    plain = type(values) is np.ndarray or isinstance(values, np.generic | int | float)
    made = np.asarray(values) if plain else _read(name, values)
    if made.dtype.names:
        fields = ", ".join(made.dtype.names[:5])
        raise DataError(f"{name} has fields ({fields}); give each as an entry: {{n: x[n] for n in x.dtype.names}}")
    return made


def _read(name: str, values: Any) -> np.ndarray:
    """Convert values other than NumPy's and plain numbers: lists, Pillow images, arrays of other libraries."""
    if hasattr(values, "toarray") or hasattr(values, "todense"):
        kind = type(values).__name__
        raise DataError(f"{name} is a sparse {kind}; make it an array with its toarray() or todense()")
    if hasattr(values, "filled") and np.ma.is_masked(values):
        raise DataError(f"{name} has masked values, which no array keeps; fill them first, as filled(0) does")
    if isinstance(values, list | tuple) and any(map(is_picture, values[:1])):
        values = [pixels(value) for value in values]
    try:
        return np.asarray(pixels(values))
    except Exception as error:  # the values' own library may raise any: TypeError, RuntimeError, BufferError
        if isinstance(error, ValueError) and isinstance(values, list | tuple):
            raise _uneven(name) from error
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name} is a {type(values).__name__} that NumPy cannot read: {cause}") from error


def _uneven(name: str) -> DataError:
    """The error for nested lists of different lengths."""
    return DataError(
        f"{name} holds lists of several lengths, which make no array; pad them, or load a list of examples, whose "
        "shapes may vary"
    )


def rows(name: str, values: Any) -> np.ndarray:
    """`values` as an array `(examples, ...)`.

    Raises:
        DataError: they are a single value, with no dimension of examples.
    """
    made = array(name, values)
    if made.ndim == 0:
        kind = made.dtype.name if made.dtype != object else type(values).__name__
        raise DataError(f"{name} is a single {kind}; an array with one row an example is expected")
    return made


def on_disk(values: Any) -> bool:
    """Whether an array is `np.memmap` or a view of one. A copy of it may not fit into memory."""
    while values is not None and not isinstance(values, np.memmap):
        values = getattr(values, "base", None)
    return values is not None


def to_device_dtype(name: str, values: Any, where: Callable[[int], str] | None = None) -> np.ndarray:
    """Convert `values` to an array of a dtype that a device has.

    float64 becomes float32 and int64 int32, unless JAX's 64-bit types are on; the byte order becomes the machine's.
    Text becomes an object array of Python strings.

    Args:
        name: the entry, for the message.
        values: anything that `array` takes.
        where: names example i for the message, if the first dimension is that of examples; None leaves it out.

    Raises:
        DataError: an integer does not fit (JAX would wrap it around silently), or bytes are not UTF-8.
    """
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
    """An object array of Python strings; bytes are decoded as UTF-8."""
    if values.dtype.kind == "S":  # NumPy drops trailing zero bytes, so this dtype is only good for text
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
    """Convert stacked examples to the dtype of their feature. Only rounding of floats may change a value.

    Args:
        name: the entry, for the message.
        feature: its feature.
        values: the stacked examples `(examples, ...)`, maybe ragged.
        entries: the index of each example, for the message.
        where: names example i for the message.

    Raises:
        DataError: the conversion would change a value by more than rounding, or a value is not a number.

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
        raise_first_wrong(name, feature, values, np.reshape(odd, values.shape), expected, entries, where)
    with np.errstate(invalid="ignore", over="ignore"):
        made = values.astype(dtype)
    if not ("float" in dtype.name and "float" in values.dtype.name):
        raise_first_wrong(name, feature, values, _comparable(made) != _comparable(values), expected, entries, where)
    return made


def _comparable(values: np.ndarray) -> np.ndarray:
    """bfloat16 and float8, whose NumPy kind is V, as float32; other dtypes unchanged."""
    return values.astype(np.float32) if values.dtype.kind == "V" else values


def raise_first_wrong(name, feature: Feature, values, wrong: np.ndarray, expected: str, entries, where) -> None:
    """Raise `DataError` if any value is wrong. The message names the first one's example, position and column.

    Args:
        name: the entry, for the message.
        feature: its feature, for the names of columns.
        values: the stacked examples `(examples, ...)`.
        wrong: which values are wrong, bool, of the shape of `values`.
        expected: what was expected, for the message.
        entries: the index of each example.
        where: names example i.
    """
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
    """Whether this is an object array of arrays, which `stack` makes of examples of different shapes."""
    return values.dtype == object and values.size > 0 and isinstance(values.flat[0], np.ndarray)

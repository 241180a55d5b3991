"""One-line representations of values that hold arrays.

`brief` represents any value. A class with fields gets such a representation by ``__repr__ = in_brief``.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from sapwood.core import paths
from sapwood.core.model_output import has_shape
from sapwood.core.traces import is_traced

MOST = 200
"""The most characters that `brief` shows of a value without arrays."""
NAMES = 6
"""The most top-level names that `brief` shows of a tree."""


def brief(value: Any) -> str:
    """Represent any value in one line.

    An array is shown by its dtype and shape. A dict of arrays is shown by its top-level names, the number of arrays in
    it and the number of elements of all arrays.

    >>> brief({"stem": {"kernel": np.zeros((9, 4)), "bias": np.zeros(4)}, "head": np.zeros((4, 2))})
    '{head, stem: 3 arrays, 48 numbers}'
    >>> brief(np.zeros((9, 4), "float32")), brief(np.float32(0.5)), brief({"loss": 0.5})
    ('float32[9,4]', '0.5', "{'loss': 0.5}")
    """
    if type(value).__repr__ is in_brief:
        return repr(value)
    arrays = [x for x in jax.tree.leaves(value) if has_shape(x)]
    if not arrays:
        text = repr(value)
        return text if len(text) <= MOST else f"{text[: MOST - 3]}..."
    if arrays[0] is value:
        return _of_array(value)
    count = sum(math.prod(x.shape) for x in arrays)
    held = f"{len(arrays)} array{'s' * (len(arrays) > 1)}, {count:,} number{'s' * (count != 1)}"
    if not isinstance(value, dict):
        return f"{type(value).__name__} of {held}"
    names = sorted(map(str, value), key=paths.order)
    more = ", ..." if len(names) > NAMES else ""
    return f"{{{', '.join(names[:NAMES])}{more}: {held}}}"


def in_brief(self: Any) -> str:
    """A `__repr__` for dataclasses and named tuples: each field in one line; fields that are None are left out."""
    shown = [f.name for f in dataclasses.fields(self) if f.repr] if dataclasses.is_dataclass(self) else self._fields
    told = ((name, getattr(self, name)) for name in shown)
    return f"{type(self).__name__}({', '.join(f'{n}={brief(x)}' for n, x in told if x is not None)})"


def _of_array(x: Any) -> str:
    """The value of a scalar if it is known, else the dtype and shape of the array."""
    gone = is_traced(x) or (isinstance(x, jax.Array) and (x.is_deleted() or not x.is_fully_addressable))
    if x.shape == () and not gone and getattr(x.dtype, "kind", "V") in "biuf" and isinstance(x, jax.Array | np.generic):
        return str(jax.device_get(x))
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"

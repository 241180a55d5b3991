"""Windows of convolutions and pooling: checks and canonical forms of sizes, strides, dilation and padding.

`who` is the name of the layer or function in error messages. All sizes are known while tracing, except the symbolic
ones of an exported model.
"""

import numbers
from typing import Any

from jax import lax

from sapwood.core.errors import ConfigError, InputError

Sizes = int | tuple[int, ...]
"""One integer for all spatial dimensions, or a tuple with one for each."""
Padding = str | int | tuple[int | tuple[int, int], ...]
"""Names "SAME", "VALID", "CAUSAL", an integer, or a tuple of integers or pairs (before, after), one a dimension."""


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, numbers.Integral) and int(value) >= least


def per_dimension(who: str, name: str, value: Sizes, n: int) -> tuple[int, ...]:
    """A positive integer for each of `n` dimensions, from one integer or a tuple of `n`.

    Raises `ConfigError` for other values.

    >>> per_dimension("conv", "strides", 2, 3)
    (2, 2, 2)
    """
    values = value if isinstance(value, tuple) else (value,) * n
    if len(values) != n or not all(_whole(i, 1) for i in values):
        raise ConfigError(f"{who}: {name} must be an integer above 0 or a tuple of {n}, one a dimension; got {value!r}")
    return values


def window(who: str, name: str, value: Any) -> tuple[int, ...]:
    """Check a window, a tuple of one positive integer for each of 1 to 3 spatial dimensions, and return it unchanged.

    >>> window("Conv", "kernel_size", 3)
    Traceback (most recent call last):
    sapwood.core.errors.ConfigError: Conv: kernel_size must be a tuple with a size for each spatial dimension, \
such as (3,), (3, 3) or (3, 3, 3); got 3
    """
    if not isinstance(value, tuple) or not 1 <= len(value) <= 3:
        raise ConfigError(
            f"{who}: {name} must be a tuple with a size for each spatial dimension, such as "
            f"(3,), (3, 3) or (3, 3, 3); got {value!r}"
        )
    return per_dimension(who, name, value, len(value))


def padding(who: str, value: Any, n: int, causal: bool = False) -> str | tuple[tuple[int, int], ...]:
    """Padding in canonical form: an upper-case name, or `n` pairs (before, after).

    Raises `ConfigError` for other values, and for "CAUSAL" unless `causal` is true and `n` is 1.

    >>> padding("conv", "same", 2), padding("conv", 1, 2), padding("conv", (0, (1, 2)), 2)
    ('SAME', ((1, 1), (1, 1)), ((0, 0), (1, 2)))
    """
    names = ("SAME", "VALID", "CAUSAL") if causal else ("SAME", "VALID")
    if isinstance(value, str) and value.upper() in names:
        if value.upper() == "CAUSAL" and n != 1:
            raise ConfigError(
                f"{who}: padding 'CAUSAL' is for sequences (one spatial dimension), here are {n}; "
                "give a pair (before, after) for each dimension"
            )
        return value.upper()
    given = value if isinstance(value, tuple) else (value,) * n
    pairs = tuple(p if isinstance(p, tuple) else (p, p) for p in given)
    if len(pairs) != n or not all(len(p) == 2 and _whole(p[0], 0) and _whole(p[1], 0) for p in pairs):
        raise ConfigError(
            f"{who}: padding must be {', '.join(map(repr, names))}, an integer from 0 up, or a tuple of "
            f"{n} integers or pairs (before, after), one a dimension; got {value!r}"
        )
    return pairs  # type: ignore[return-value]


def amounts(
    padding: str | tuple[tuple[int, int], ...],
    sizes: tuple[int, ...],
    window: tuple[int, ...],
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    """How many elements a padding adds before and after each spatial dimension.

    "SAME" makes the output's size ceil(size / stride), as in TensorFlow. "CAUSAL" pads only in front, so no output sees
    a later input.

    Args:
        padding: a name or pairs (before, after), as the function `padding` returns them.
        sizes: the input's spatial sizes.
        window, strides, dilation: one integer for each spatial dimension.
    """
    spans = tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))
    if padding == "CAUSAL":
        return ((spans[0] - 1, 0),)
    if isinstance(padding, str):
        return tuple(lax.padtype_to_pads(sizes, spans, strides, padding))
    return padding  # type: ignore[return-value]


def must_fit(who: str, sizes: tuple[int, ...], pads, window: tuple[int, ...], dilation: tuple[int, ...]) -> None:
    """Raise `InputError` if a window is larger than the padded input, which would leave an empty output."""
    padded = [size + sum(pad) for size, pad in zip(sizes, pads, strict=True)]
    spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    # a symbolic size is known only when the exported model is called
    if any(isinstance(size, int) and size < span for size, span in zip(padded, spans, strict=True)):
        raise InputError(
            f"{who}: a window of {tuple(spans)} does not fit into {tuple(padded)}, the size of the input "
            f"with its padding; use a smaller window or padding 'SAME'"
        )

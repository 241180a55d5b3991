"""Metrics on their way to the host: all numbers of a step as one vector, because fetching costs by the array."""

import base64
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD = "uint32"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """The leaves of a tree as vectors, bit for bit: one of words for bits and all that has 32 bits, and one for each
    other dtype. ``of`` is the tree's structure and its leaves' shapes and dtypes; the vectors may have leading axes
    in addition, as a loop gives them.
    """

    vectors: dict[str, Any]
    of: tuple[Any, tuple[tuple[tuple[int, ...], str], ...]] = dataclasses.field(metadata={"static": True})


def pack(tree: Any) -> Packed:
    """A tree of numbers as few vectors, in a compiled program.

    >>> tree = {"loss": jnp.float32(0.5), "ok": jnp.array([True, False]), "half": jnp.bfloat16(2)}
    >>> packed = pack(tree)
    >>> {name: x.shape for name, x in packed.vectors.items()}
    {'bfloat16': (1,), 'uint32': (3,)}
    >>> unpack(packed)["ok"].tolist()
    [True, False]
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
    parts: dict[str, list[jax.Array]] = {}
    for x in leaves:
        parts.setdefault(_kind(x.dtype), []).append(_bits(x).ravel())
    vectors = {kind: jnp.concatenate(flat) for kind, flat in sorted(parts.items())}
    return Packed(vectors, (structure, tuple((x.shape, x.dtype.name) for x in leaves)))


def unpack(packed: Packed) -> Any:
    """The tree of NumPy arrays, each with the vectors' leading axes."""
    structure, kinds = packed.of
    vectors = {kind: np.asarray(x) for kind, x in packed.vectors.items()}
    begin = dict.fromkeys(vectors, 0)
    leaves = []
    for shape, name in kinds:
        dtype = jnp.dtype(name)
        kind = _kind(dtype)
        end = begin[kind] + math.prod(shape)
        flat = vectors[kind][..., begin[kind] : end]
        flat = flat.astype(bool) if dtype.kind == "b" else np.ascontiguousarray(flat).view(dtype)
        leaves.append(flat.reshape((*flat.shape[:-1], *shape)))
        begin[kind] = end
    return jax.tree.unflatten(structure, leaves)


def join(parts: Sequence[Packed]) -> Packed:
    """Vectors of steps ``(numbers,)`` and of blocks ``(block, numbers)`` as one on the host, ``(steps, numbers)``.

    >>> one, two = pack({"x": jnp.float32(1)}), jax.vmap(pack)({"x": jnp.array([2., 3.])})
    >>> unpack(join([one, two]))["x"].tolist()
    [1.0, 2.0, 3.0]
    """

    def steps(kind: str) -> np.ndarray:
        return np.concatenate([np.atleast_2d(jax.device_get(part.vectors[kind])) for part in parts])

    return Packed({kind: steps(kind) for kind in parts[0].vectors}, parts[0].of)


def to_text(vector: np.ndarray) -> list[Any]:
    """A vector's shape and its bits, as JSON holds them.

    >>> from_text("float16", *to_text(np.float16([[1, 2]]))).tolist()
    [[1.0, 2.0]]
    """
    return [list(vector.shape), base64.b64encode(np.ascontiguousarray(vector).tobytes()).decode()]


def from_text(kind: str, shape: list[int], bits: str) -> np.ndarray:
    """What `to_text` wrote, of a dtype."""
    return np.frombuffer(base64.b64decode(bits), jnp.dtype(kind)).reshape(shape)


def _kind(dtype: Any) -> str:
    return WORD if dtype.kind == "b" or (dtype.itemsize == 4 and dtype.kind in "fiu") else dtype.name


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == bool:
        return x.astype(WORD)
    return lax.bitcast_convert_type(x, WORD) if _kind(x.dtype) == WORD and x.dtype != WORD else x

"""`Packed`: the metrics of a step as few vectors for the transfer to the host, since each array that is fetched costs.

`pack` runs in the compiled step. `join` and `unpack` run on the host. Every number keeps its bits. `to_text` and
`from_text` put vectors into a checkpoint's JSON, for a row of metrics that is not closed yet.
"""

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
    """The leaves of a tree as vectors, bit for bit.

    Attributes:
        vectors: dict from a dtype to a vector ``(numbers,)``. "uint32" holds booleans and all numbers of 32 bits; every
            other dtype has a vector of its own. Vectors may have leading axes, such as those of a loop.
        of: the structure of the tree, and the shape and dtype of each leaf; static.
    """

    vectors: dict[str, Any]
    of: tuple[Any, tuple[tuple[tuple[int, ...], str], ...]] = dataclasses.field(metadata={"static": True})


def pack(tree: Any) -> Packed:
    """Pack a tree of arrays into few vectors, in a compiled program.

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
    """Return the tree as NumPy arrays, each with the leading axes of the vectors."""
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
    """Join the metrics of several calls of the compiled program into those of all steps, in order, on the host.

    The vectors of a part are ``(numbers,)`` for one step, and ``(steps, numbers)`` for a block, which is several steps
    in one call. The vectors of the result are ``(steps, numbers)`` with all steps.

    >>> one, two = pack({"x": jnp.float32(1)}), jax.vmap(pack)({"x": jnp.array([2., 3.])})
    >>> unpack(join([one, two]))["x"].tolist()
    [1.0, 2.0, 3.0]
    """

    def steps(kind: str) -> np.ndarray:
        return np.concatenate([np.atleast_2d(jax.device_get(part.vectors[kind])) for part in parts])

    return Packed({kind: steps(kind) for kind in parts[0].vectors}, parts[0].of)


def to_text(vector: np.ndarray) -> list[Any]:
    """Return the shape of a vector, and its bytes in base64, as values for JSON.

    >>> from_text("float16", *to_text(np.float16([[1, 2]]))).tolist()
    [[1.0, 2.0]]
    """
    return [list(vector.shape), base64.b64encode(np.ascontiguousarray(vector).tobytes()).decode()]


def from_text(kind: str, shape: list[int], bits: str) -> np.ndarray:
    """Return the array that `to_text` wrote. ``kind`` is its dtype."""
    return np.frombuffer(base64.b64decode(bits), jnp.dtype(kind)).reshape(shape)


def _kind(dtype: Any) -> str:
    """Return the name of the vector that holds leaves of a dtype."""
    return WORD if dtype.kind == "b" or (dtype.itemsize == 4 and dtype.kind in "fiu") else dtype.name


def _bits(x: jax.Array) -> jax.Array:
    """Return an array in the dtype of its vector."""
    if x.dtype == bool:
        return x.astype(WORD)
    return lax.bitcast_convert_type(x, WORD) if _kind(x.dtype) == WORD and x.dtype != WORD else x

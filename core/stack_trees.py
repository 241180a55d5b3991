"""`stack` and `unstack` convert trees of variables between the two forms of a stack of equal layers.

A scanned stack has one leaf with a leading dimension, ``{"up": w[3, ...]}``. An unrolled stack has one child for each
layer, ``{"0": {"up": w0}, "1": ..., "2": ...}``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core import paths
from sapwood.core.errors import DeclarationError


def stack(tree: dict) -> dict:
    """Convert the tree of an unrolled stack (children ``"0"``, ``"1"``, ...) to that of a scanned one.

    Each leaf gets a leading dimension. NumPy arrays stay NumPy arrays. Raises `DeclarationError` if the children differ
    in structure, shape or dtype, or if the names are not ``"0"``, ``"1"``, ...

    >>> stack({"0": {"w": jnp.zeros(2)}, "1": {"w": jnp.ones(2)}})["w"].shape
    (2, 2)
    """
    names = sorted(tree, key=paths.order)
    if names != [str(i) for i in range(len(names))] or not names:
        raise DeclarationError(f"an unrolled stack has the children '0', '1', ..., this tree has {names}")
    flat = [dict(paths.leaves(tree[name])) for name in names]
    for name, other in zip(names[1:], flat[1:], strict=True):
        for path in sorted(flat[0].keys() | other.keys()):
            a, b = (jax.typeof(t[path]) if path in t else "nothing" for t in (flat[0], other))
            if a != b:
                raise DeclarationError(f"{name}/{paths.join(path)} is {b}, but 0/{paths.join(path)} is {a}")
    return paths.nest((path, _stacked([t[path] for t in flat])) for path in flat[0])


def _stacked(leaves: list) -> Any:
    if all(isinstance(leaf, np.ndarray) for leaf in leaves):  # cast to the dtype that JAX would use
        return np.stack(leaves).astype(jax.dtypes.canonicalize_dtype(leaves[0].dtype), copy=False)
    return jnp.stack(leaves)


def unstack(tree: dict) -> dict:
    """Convert the tree of a scanned stack to that of an unrolled one; the inverse of `stack`.

    Raises `DeclarationError` if the leaves have different leading sizes, or no dimension.

    >>> sorted(unstack({"w": jnp.zeros((2, 3))}))
    ['0', '1']
    """
    flat = list(paths.leaves(tree))
    sizes: dict[Any, str] = {}
    for path, leaf in flat:
        sizes.setdefault(jnp.shape(leaf)[0] if jnp.ndim(leaf) else "no", paths.join(path))
    if len(sizes) != 1 or "no" in sizes:
        found = ", ".join(f"{size} at {path}" for size, path in sizes.items())
        raise DeclarationError(
            f"a scanned stack has one leading size in all its leaves, this tree has {found or 'none'}"
        )
    n = next(iter(sizes))
    return {str(i): paths.nest((path, leaf[i]) for path, leaf in flat) for i in range(n)}

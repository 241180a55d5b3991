"""`Recorder`: the declarations of a model, gathered by absolute path.

Cursors hold the recorder by reference, so it also receives declarations made inside JAX transforms. It refuses two
declarations of one path that differ, and a name that is both a variable and a scope.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax

from sapwood.core.errors import ConfigError, DeclarationError
from sapwood.core.param import Param, Stacked
from sapwood.core.paths import Path, join, nest, order
from sapwood.core.same_initializer import initializer_key


def concrete_shape(shape: Any, path: Path) -> tuple[int, ...]:
    """A shape as a tuple of plain integers. Raises `DeclarationError` if a size is symbolic, traced or negative."""
    shape = shape if isinstance(shape, tuple | list) else (shape,)
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except Exception:  # symbolic dimensions raise errors of their own class
        raise DeclarationError(
            f"{join(path)}: a variable's shape must be plain integers, got {tuple(map(str, shape))}; a symbolic or "
            "traced size cannot shape a parameter: take it from a hyper-parameter or a fixed dimension"
        ) from None
    if any(n < 0 for n in sizes):
        raise DeclarationError(f"{join(path)}: a variable's shape cannot be negative, got {sizes}")
    return sizes


def storage_dtype(dtype: Any, path: Path) -> Any:
    """``dtype`` as a canonical JAX dtype. Raises a `ConfigError` that names the variable if it is no dtype."""
    try:
        return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)
    except TypeError:
        raise ConfigError(f"{join(path)}: {dtype!r} is no dtype; write 'float32', jnp.bfloat16 or the like") from None


_MODES = (
    ". If this is one line, run once to train and once to evaluate, its initialiser holds other numbers each time: "
    "make them outside of the model"
)


class Recorder:
    """Every declaration of one `spec`, in train and in eval mode together.

    Args:
        on_call: called with ``(v, layer, xs, y)`` after each layer call.
        on_enter: called with ``(v, layer)`` before each layer call; returns its scope's name in the traced program.
        on_shard: called with ``(v, x, axes)`` by each `Vars.shard`.
    """

    __slots__ = ("__weakref__", "on_call", "on_enter", "on_shard", "tables", "where")

    def __init__(
        self,
        on_call: Callable[..., None] | None = None,
        on_enter: Callable[..., str] | None = None,
        on_shard: Callable[..., None] | None = None,
    ):
        self.tables: dict[str, dict[Path, Param]] = {"params": {}, "state": {}}
        self.where: dict[Path, str] = {}  # scope -> the first variable that was declared below it
        self.on_call = on_call
        self.on_enter = on_enter
        self.on_shard = on_shard

    def declare(self, kind: str, path: Path, param: Param) -> None:
        """Record a declaration. Raises `DeclarationError` if it contradicts an earlier one."""
        known = self.tables[kind].get(path)
        if known is None:
            self._claim(kind, path)
            self.tables[kind][path] = param
            return
        for what in ("shape", "dtype", "axes", "init"):
            old, new = getattr(known, what), getattr(param, what)
            if initializer_key(old) != initializer_key(new) if what == "init" else old != new:
                raise DeclarationError(
                    f"{kind} {join(path)} is declared twice with a different {what}: first {old}, now {new}; "
                    "variables that share a path are one variable: give them different names, or make them agree"
                    + (_MODES if what == "init" else "")
                )

    def _claim(self, kind: str, path: Path) -> None:
        """Raise `DeclarationError` if a name would be both variable and scope, or be in both params and state."""
        for known, other in self.tables.items():
            if other is not self.tables[kind] and path in other:
                raise DeclarationError(
                    f"{join(path)} is declared in {known} and now in {kind}; one name is one variable"
                )
        if path in self.where:
            raise DeclarationError(
                f"{join(path)} is a scope (it holds {self.where[path]}) and is now declared as a variable in {kind}; "
                "give one of the two another name"
            )
        for k in range(1, len(path)):
            for known in ("params", "state"):
                if path[:k] in self.tables[known]:
                    raise DeclarationError(
                        f"{join(path[:k])} is a variable in {known} and now a scope that holds {join(path)}; "
                        "give one of the two another name"
                    )
            self.where.setdefault(path[:k], join(path))

    def tree(self, kind: str) -> dict:
        """The declarations of ``kind`` (``"params"`` or ``"state"``) as nested dicts, numbers sorted as numbers."""
        table = self.tables[kind]
        return nest((path, table[path]) for path in sorted(table, key=lambda path: [order(name) for name in path]))


def stacked_param(shape, dtype, init, axes, stacked: tuple[Stacked, ...]) -> Param:
    """The `Param` of a variable declared inside stacked cursors. Their sizes are the leading dimensions of its shape.

    Args:
        shape: the shape of one copy.
        dtype: its dtype.
        init: ``init(key, shape, dtype)`` makes the first value of one copy.
        axes: the logical axis names of one copy, or None.
        stacked: the stacked dimensions, outermost first.
    """
    if axes is not None:
        axes = (*(s.axis for s in stacked), *axes)
    return Param((*(s.size for s in stacked), *shape), dtype, init, axes, stacked)

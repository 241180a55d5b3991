"""The declarations of a model: what each variable is, gathered by absolute path through any transform."""

import operator
from collections.abc import Callable
from typing import Any

import jax

from sapwood.core.errors import ConfigError, DeclarationError
from sapwood.core.param import Param, Stacked
from sapwood.core.paths import Path, join, nest, order
from sapwood.core.same_initializer import identity


def concrete_shape(shape: Any, path: Path) -> tuple[int, ...]:
    """A shape of plain integers, or a `DeclarationError` that says what is wrong with it."""
    shape = shape if isinstance(shape, tuple | list) else (shape,)
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except Exception:  # symbolic dimensions refuse in a way of their own
        raise DeclarationError(
            f"{join(path)}: a variable's shape must be plain integers, got {tuple(map(str, shape))}; a symbolic or "
            "traced size cannot shape a parameter: take it from a hyper-parameter or a fixed dimension"
        ) from None
    if any(n < 0 for n in sizes):
        raise DeclarationError(f"{join(path)}: a variable's shape cannot be negative, got {sizes}")
    return sizes


def storage_dtype(dtype: Any, path: Path) -> Any:
    """A JAX dtype, or a `ConfigError` naming the variable."""
    try:
        return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)
    except TypeError:
        raise ConfigError(f"{join(path)}: {dtype!r} is no dtype; write 'float32', jnp.bfloat16 or the like") from None


_MODES = (
    ". If this is one line, run once to train and once to evaluate, its initialiser holds other numbers each time: "
    "make them outside of the model"
)


class Recorder:
    """Every declaration of one `spec`, in train and in eval mode together."""

    __slots__ = ("__weakref__", "on_call", "on_enter", "on_shard", "tables", "where")

    def __init__(
        self,
        on_call: Callable[..., None] | None = None,
        on_enter: Callable[..., str] | None = None,
        on_shard: Callable[..., None] | None = None,
    ):
        self.tables: dict[str, dict[Path, Param]] = {"params": {}, "state": {}}
        self.where: dict[Path, str] = {}  # what each path is: a variable, or a scope because of this variable below it
        self.on_call = on_call  # (v, layer, xs, y) after each layer call
        self.on_enter = on_enter  # (v, layer) before it: the name of its scope in the traced program
        self.on_shard = on_shard  # (v, x, axes) where an activation says its logical axes

    def declare(self, kind: str, path: Path, param: Param) -> None:
        """Note a declaration; raise a `DeclarationError` where it contradicts another one."""
        known = self.tables[kind].get(path)
        if known is None:
            self._claim(kind, path)
            self.tables[kind][path] = param
            return
        for what in ("shape", "dtype", "axes", "init"):
            old, new = getattr(known, what), getattr(param, what)
            if identity(old) != identity(new) if what == "init" else old != new:
                raise DeclarationError(
                    f"{kind} {join(path)} is declared twice with a different {what}: first {old}, now {new}; "
                    "variables that share a path are one variable: give them different names, or make them agree"
                    + (_MODES if what == "init" else "")
                )

    def _claim(self, kind: str, path: Path) -> None:
        """Hold a name to one meaning: a variable or a scope, in params or in state."""
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
        """The declarations as nested dicts, numbers sorted as numbers."""
        table = self.tables[kind]
        return nest((path, table[path]) for path in sorted(table, key=lambda path: [order(name) for name in path]))


def stacked_param(shape, dtype, init, axes, stacked: tuple[Stacked, ...]) -> Param:
    """The `Param` of a variable declared inside stacked cursors: their sizes lead its shape."""
    if axes is not None:
        axes = (*(s.axis for s in stacked), *axes)
    return Param((*(s.size for s in stacked), *shape), dtype, init, axes, stacked)

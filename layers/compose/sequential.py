"""Sequential: layers and plain functions, one after the other.

Each entry takes the output of the one before. Its scope is its position in a list, or its key in a dict.
"""

from collections.abc import Callable, Iterator
from typing import Any

from sapwood.core.errors import ConfigError
from sapwood.core.layer import Layer
from sapwood.core.vars import Vars


class Sequential(Layer):
    """Call `layers` one after the other; each takes the output of the one before.

    `layers` is a list, whose scopes are "0", "1", ... by position, or a dict, whose keys are the scopes. A `Layer` is
    called with its cursor. Any other callable is a plain function of arrays, such as `jax.nn.relu` (`sw.layer` makes a
    layer of a function that takes a cursor). The first entry gets all inputs. Raises `ConfigError` for an entry that
    cannot be called.

    >>> import jax, jax.numpy as jnp
    >>> from sapwood import layers as L
    >>> model = Sequential([L.Flatten(), jax.nn.relu, L.Dense(1, bias=False)])
    >>> model({"2": {"kernel": jnp.ones((4, 1))}}, jnp.array([[[1.0, -1.0], [2.0, 3.0]]]))
    Array([[6.]], dtype=float32)
    """

    layers: tuple

    def __post_init__(self) -> None:
        given = self.layers
        if not isinstance(given, dict | list | tuple):
            raise ConfigError(f"Sequential: layers must be a list, or a dict of named layers, got {given!r}")
        # a dict is kept as a tuple of pairs, so that a Sequential is hashable
        object.__setattr__(self, "layers", tuple(given.items() if isinstance(given, dict) else given))
        for name, child in self.children():
            if isinstance(child, type) or not callable(child):
                hint = f"; write {child.__name__}()" if isinstance(child, type) else ""
                raise ConfigError(f"Sequential: {name!r} must be a layer or a function of arrays, got {child!r}{hint}")

    def children(self) -> Iterator[tuple[str, Callable]]:
        """Pairs of scope name and layer, in order."""
        for i, child in enumerate(self.layers):
            yield child if isinstance(child, tuple) else (str(i), child)

    def __call__(self, v: Vars, *xs: Any) -> Any:
        for name, child in self.children():
            try:
                xs = (child(v[name], *xs) if isinstance(child, Layer) else child(*xs),)
            except Exception as error:
                if not isinstance(child, Layer):  # a layer adds its own note
                    error.add_note(f"in {name!r} of Sequential: {getattr(child, '__name__', child)}")
                raise
        return xs[0]

"""`Layer`: a frozen dataclass of hyper-parameters whose call declares variables and computes.

`Layer.__init_subclass__` makes each subclass a frozen dataclass and wraps two of its methods. The wrapped ``__init__``
explains wrong arguments. The wrapped ``__call__`` takes a raw dict as well as a cursor, names the scope in profiles,
and adds the path to errors.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sapwood.core import migration_hints, paths
from sapwood.core.errors import ConfigError
from sapwood.core.model_output import has_shape, refuse_lazy
from sapwood.core.vars import Vars, as_vars


def describe(x: Any) -> str:
    """The dtypes and shapes of the leaves of ``x``, as errors and summaries print them.

    >>> import jax.numpy as jnp
    >>> describe((jnp.ones((2, 3)), [jnp.ones(4, "bfloat16")], None, 7))
    'float32[2,3], bfloat16[4], None, 7'
    """
    found = []
    for leaf in jax.tree.leaves(x, is_leaf=lambda leaf: leaf is None or isinstance(leaf, Vars)):
        if has_shape(leaf):
            found.append(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")
        else:
            found.append(repr(leaf) if len(repr(leaf)) <= 40 else type(leaf).__name__)
    return ", ".join(found)


@typing.dataclass_transform(frozen_default=True)
class Layer:
    """Base class of every layer. A subclass is a frozen dataclass of its annotated fields, without a decorator.

    A layer holds hyper-parameters, never arrays. Layers compare and hash by value and print as their constructor call,
    and one layer may be called at many places. Errors inside its call, JAX's own included, carry a note with the path,
    the layer and its input shapes. Profiles show the path.

    >>> class Scale(Layer):
    ...     start: float = 1.0
    ...     def __call__(self, v, x):
    ...         return x * v.param("scale", (x.shape[-1],), lambda key, shape, dtype: jax.numpy.full(shape, self.start))
    >>> Scale(2.0), Scale() == Scale(1.0)
    (Scale(start=2.0), True)
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__call__" in cls.__dict__:
            cls.__call__ = _located(cls.__dict__["__call__"])
        own = "__init__" in cls.__dict__
        dataclasses.dataclass(frozen=True, repr=False)(cls)
        if not own:
            cls.__init__ = _checked(cls)

    def __call__(self, v: Vars, *xs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} defines no __call__(self, v, ...)")

    if not typing.TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise migration_hints.attribute(self, name)

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.repr and not (field.default is not dataclasses.MISSING and _same(value, field.default)):
                shown.append(f"{field.name}={_written(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _checked(cls: type) -> Callable:
    """The ``__init__`` of a layer, with errors that say what to write instead.

    It raises `TypeError` for an unknown option or too many values, and `ConfigError` for a boolean field that is set to
    no boolean.
    """
    made, name = cls.__init__, cls.__name__
    fields = list(inspect.signature(made).parameters)[1:]  # `InitVar` arguments included, which are no fields
    switches = [field for field in dataclasses.fields(cls) if field.init and field.type in (bool, "bool")]  # type: ignore[arg-type]

    @functools.wraps(made)
    def init(self, *args, **options):
        for given in options:
            if given not in fields:
                raise TypeError(
                    f"{name} has no option {given!r}{migration_hints.answer(migration_hints.OPTIONS, given, fields)}"
                )
        if len(args) > len(fields):
            raise TypeError(f"{name}({', '.join(fields)}) was given {len(args)} values{migration_hints.meant(args)}")
        made(self, *args, **options)
        for field in switches:
            value = getattr(self, field.name)
            if not isinstance(value, bool | np.bool_) and value is not field.default:
                raise ConfigError(
                    f"{name}: {field.name} must be True or False, got {value!r}{migration_hints.meant((value,))}"
                )

    return init


def _written(value: Any) -> str:
    """A value as in source code: `repr`, but functions by name (`jax.nn.relu` has an address in its `repr`)."""
    if isinstance(value, tuple):
        inside = ", ".join(map(_written, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, Layer) or not callable(value):
        return repr(value)
    return getattr(value, "__name__", None) or repr(value)


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:
        return False


def _located(call: Callable) -> Callable:
    """Wrap a layer's ``__call__``.

    The wrapper converts a raw dict to a cursor, opens a profiler scope named after the path, adds the path to every
    error, and calls the recorder of `spec` before and after.
    """

    @functools.wraps(call)
    def located(self, v, *xs, **options):
        v = as_vars(v, self)
        scope = "/".join(v._path[v._scope :]) or type(self).__name__
        recorder = v._recorder() if v._recorder is not None else None
        if recorder is not None and recorder.on_enter is not None:
            scope = recorder.on_enter(v, self)
        try:
            with jax.named_scope(scope):
                y = refuse_lazy(self, call(self, v._with(_scope=len(v._path)), *xs, **options))
        except Exception as error:
            _add_note(error, f"in {paths.join(v._path)}", self, (xs, options))
            raise
        if recorder is not None and recorder.on_call is not None:
            recorder.on_call(v, self, xs, y)
        return y

    return located


def _add_note(error: Exception, place: str, layer: Layer, inputs: Any) -> None:
    """Add a note to an error: its place, the layer and its inputs.

    If these cannot be printed, the note has only the layer's class, so that the original error is still the one raised.
    """
    try:
        note = f"{place}: {layer!r} on {describe(inputs)}"
    except Exception:
        note = f"{place}: {type(layer).__name__}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


class Function(Layer):
    """A plain function ``f(v, *xs)`` as a layer. The decorator `layer` makes it."""

    function: Callable

    def __call__(self, v: Vars, *xs: Any, **options: Any) -> Any:
        return self.function(v, *xs, **options)

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def layer(f: Callable) -> Function:
    """Make a `Layer` of a plain function ``f(v, *xs)``, with a scope in `L.Sequential`, its path in errors, and a repr.

    >>> @layer
    ... def residual(v, x):
    ...     return x + x @ v.param("kernel", (x.shape[-1],) * 2, jax.nn.initializers.zeros)
    >>> residual
    residual
    >>> residual({"kernel": jax.numpy.eye(2)}, jax.numpy.ones(2))
    Array([2., 2.], dtype=float32)
    """
    return Function(f)

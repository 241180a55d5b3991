"""`Layer`: a frozen dataclass of hyper-parameters whose call declares variables and computes."""

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
from sapwood.core.model_output import computed, has_shape
from sapwood.core.vars import Vars, as_vars


def describe(x: Any) -> str:
    """The dtypes and shapes of a value, as errors and summaries print them.

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
    """Base of every layer. A subclass is a frozen dataclass of its annotated fields, without a decorator.

    It holds hyper-parameters, never arrays: layers compare and hash by value, print as they were written, and one
    layer may be called at many places. Errors inside its call, JAX's own included, carry a note with the path, the
    layer and its input shapes; profiles show the path.

    >>> class Scale(Layer):
    ...     start: float = 1.0
    ...     def __call__(self, v, x):
    ...         return x * v.param("scale", (x.shape[-1],), lambda key, shape, dtype: jax.numpy.full(shape, self.start))
    >>> Scale(2.0), Scale() == Scale(1.0)
    (Scale(start=2.0), True)
    """

    def __init_subclass__(cls, **options):
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
    """How a layer is made, with what to write where it is given what it does not take."""
    made, name = cls.__init__, cls.__name__
    fields = list(inspect.signature(made).parameters)[1:]  # an `InitVar`, which is no field, included
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
    """A value as it was written: functions by name (`jax.nn.relu` prints as an object at an address)."""
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
    """A layer's call with its place: the cursor checked, the path in the profile and in every error."""

    @functools.wraps(call)
    def located(self, v, *xs, **options):
        v = as_vars(v, self)
        scope = "/".join(v._path[v._scope :]) or type(self).__name__
        recorder = v._recorder() if v._recorder is not None else None
        if recorder is not None and recorder.on_enter is not None:
            scope = recorder.on_enter(v, self)
        try:
            with jax.named_scope(scope):
                y = computed(self, call(self, v._with(_scope=len(v._path)), *xs, **options))
        except Exception as error:
            _add_note(error, f"in {paths.join(v._path)}", self, (xs, options))
            raise
        if recorder is not None and recorder.on_call is not None:
            recorder.on_call(v, self, xs, y)
        return y

    return located


def _add_note(error: Exception, place: str, layer: Layer, inputs: Any) -> None:
    """Say where an error comes from. What cannot be printed must not take its place."""
    try:
        note = f"{place}: {layer!r} on {describe(inputs)}"
    except Exception:
        note = f"{place}: {type(layer).__name__}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


class Function(Layer):
    """A plain function ``f(v, *xs)`` as a layer; made by `layer`."""

    function: Callable

    def __call__(self, v: Vars, *xs: Any, **options: Any) -> Any:
        return self.function(v, *xs, **options)

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def layer(f: Callable) -> Function:
    """A plain ``f(v, *xs)`` as a `Layer`: it gets a scope in `L.Sequential`, its path in errors, and a repr.

    >>> @layer
    ... def residual(v, x):
    ...     return x + x @ v.param("kernel", (x.shape[-1],) * 2, jax.nn.initializers.zeros)
    >>> residual
    residual
    >>> residual({"kernel": jax.numpy.eye(2)}, jax.numpy.ones(2))
    Array([2., 2.], dtype=float32)
    """
    return Function(f)

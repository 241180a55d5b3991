"""The layer calls of a model and its traced program, from which `summary`, `graph` and `profile` are made.

`trace_calls` gives every layer call a number and runs it in a named scope ``sapwood.call.NUMBER``. The scope's name
stays in the name stacks of the equations, where `call_numbers` finds it. Watched functions have scopes
``sapwood.function.NUMBER``, which `function_numbers` finds.
"""

import contextlib
import dataclasses
import functools
import math
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from sapwood.core import paths
from sapwood.core.bind import bind, pure
from sapwood.core.declare import Recorder
from sapwood.core.errors import EffectError
from sapwood.core.layer import Layer, describe
from sapwood.core.model_output import has_shape
from sapwood.core.policy import as_policy
from sapwood.core.spec import Spec, arrays_apart, spec
from sapwood.inspection.function_calls import FunctionCall, name_functions

_CALL = re.compile(r"sapwood\.call\.(\d+)")
_NAMED = re.compile(r"sapwood\.function\.(\d+)")


@dataclass(frozen=True)
class Call:
    """One layer call.

    Attributes:
        path: the path of the layer's scope.
        layer: the layer.
        parent: the number of the call around it, or None.
        inputs: dtypes and shapes of the arguments, as `describe` writes them.
        output: dtypes and shapes of the result.
        copies: how many copies of it a stack of layers (`L.Scan`, `L.Vmap`) makes; 1 outside stacks.
    """

    path: paths.Path
    layer: Layer
    parent: int | None
    inputs: str
    output: str
    copies: int


@dataclass(frozen=True)
class TracedModel:
    """A model traced on shapes.

    Attributes:
        jaxpr: the jaxpr of the model.
        calls: the layer calls by number.
        spec: the parameters and state that the model declares.
        inputs: the name of each input: ("params" or "state", *path), ("key",) or ("input", name).
        results: the name of each result: ("output", *place), ("loss", *path) or ("state", *path).
        output: the shapes of what the model returns, as a pytree.
        named: the watched functions by number; empty unless `trace_calls` was called with ``watch=True``.
    """

    jaxpr: Any
    calls: dict[int, Call]
    spec: Spec
    inputs: tuple[tuple[str, ...], ...]
    results: tuple[tuple[str, ...], ...]
    output: Any
    named: dict[int, FunctionCall]


class Result(NamedTuple):
    """The results of the traced program: the model's output, its auxiliary losses and its updated state."""

    output: Any
    loss: dict
    state: dict


class _Recording:
    """Gives every layer call and watched function a number. A layer call is noted when it returns."""

    def __init__(self):
        self.calls: dict[int, Call] = {}
        self.named: dict[int, FunctionCall] = {}
        self._open: list[tuple[int, Layer]] = []
        self._number = 0

    def enter(self, v, layer: Layer) -> str:
        self._number += 1
        self._open.append((self._number, layer))
        return f"sapwood.call.{self._number}"

    def function(self, found: FunctionCall) -> str:
        self._number += 1
        self.named[self._number] = found
        return f"sapwood.function.{self._number}"

    def done(self, v, layer: Layer, xs: tuple, y: Any) -> None:
        number, opened = self._open.pop()
        while opened is not layer:  # a call that raised, and whose error the model caught
            number, opened = self._open.pop()
        parent = self._open[-1][0] if self._open else None
        copies = math.prod(s.size for s in v._stacked)
        self.calls[number] = Call(v._path, layer, parent, describe(xs), describe(y), copies)


def trace_calls(model: Callable, xs: tuple, *, train: bool, policy: Any = None, watch: bool = False) -> TracedModel:
    """Trace ``model(v, *xs)`` with every layer call marked in the program. Nothing is computed.

    In eval mode the model is traced without a random key first, since a key adds equations to the program. It is traced
    again with a key if that raises `EffectError` (the model draws random numbers).

    Args:
        model: a layer or a function of a cursor and ``xs``.
        xs: arrays or `jax.ShapeDtypeStruct`, in any pytree.
        train: True to trace in train mode, False for eval mode.
        policy: the precision policy, or None for the default.
        watch: True to mark plain functions too (`function_calls.name_functions`).
    """
    declared = spec(model, *xs, policy=policy)
    if train:
        return _trace(model, xs, declared, train, policy, keyed=True, watch=watch)
    try:
        return _trace(model, xs, declared, train, policy, keyed=False, watch=watch)
    except EffectError:
        return _trace(model, xs, declared, train, policy, keyed=True, watch=watch)


def _trace(model: Callable, xs: tuple, declared: Spec, train: bool, policy, keyed: bool, watch: bool) -> TracedModel:
    recording = _Recording()
    recorder = Recorder(on_call=recording.done, on_enter=recording.enter)

    arrays, rest = arrays_apart(xs)

    def run(params, state, key, arrays):
        v = bind(params, state, rng=key, train=train, policy=as_policy(policy))
        with name_functions(recording.function) if watch else contextlib.nullcontext():
            y, updates = pure(model)(v._with(_recorder=weakref.ref(recorder)), *rest(arrays))
        return Result(y, updates.losses, updates.state)

    params, state = jax.tree.map(lambda param: param.struct, declared)
    key = jax.eval_shape(lambda: jax.random.key(0)) if keyed else None
    with jax.default_device("cpu"):  # kernels for GPU and TPU hide their operations from the jaxpr's readers
        jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)(params, state, key, arrays)
    inputs = [(kind, *path) for kind in ("params", "state") for path in _places(getattr(declared, kind))]
    inputs += [("key",)] * keyed + [("input", name) for name in _input_names(model, xs)]
    results = tuple(_places(shapes))
    return TracedModel(jaxpr.jaxpr, recording.calls, declared, tuple(inputs), results, shapes.output, recording.named)


def _places(tree: Any) -> list[tuple[str, ...]]:
    """The path of each leaf of a pytree as a tuple of names, in the order in which JAX flattens the pytree."""
    return [
        tuple(jax.tree_util.keystr((key,), simple=True) for key in place)
        for place, _ in jax.tree.leaves_with_path(tree)
    ]


def _input_names(model: Callable, xs: tuple) -> tuple[str, ...]:
    """A name for each input array: the name of the model's argument, followed by the path in it if it is a pytree."""
    given = model
    while hasattr(given, "function") or hasattr(given, "__wrapped__"):  # unwrap `sapwood.layer` and `jax.jit`
        given = given.function if hasattr(given, "function") else given.__wrapped__
    call = given if hasattr(given, "__code__") else type(given).__call__
    code = getattr(getattr(call, "__wrapped__", call), "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code else ()
    names = [name for name in names if name != "self"][1:]
    names = [*names, *(f"input {k}" if len(xs) > 1 else "input" for k in range(len(names), len(xs)))]
    found = []
    numbered = zip(_places(xs), jax.tree.leaves(xs), strict=True)
    for first, *rest in (place for place, leaf in numbered if has_shape(leaf)):
        found.append("/".join((names[int(first)], *rest)))
    return tuple(found)


def call_numbers(equation: Any) -> tuple[int, ...]:
    """The numbers of the layer calls that an equation is in, outermost first, without the calls around its jaxpr."""
    return _numbers(_CALL, equation)


def function_numbers(equation: Any) -> tuple[int, ...]:
    """The numbers of the functions in `Program.named` that an equation is in, outermost first, as in `call_numbers`."""
    return _numbers(_NAMED, equation)


def _numbers(mark: re.Pattern, equation: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map(int, mark.findall(str(equation.source_info.name_stack)))))


class LayersByPath(dict):
    """The layers called at each path, as a list of chains of calls.

    A chain is a layer call and the nested layer calls in the same scope, outermost first: `L.Scan`, then its block.
    """

    @functools.cached_property
    def above(self) -> frozenset[paths.Path]:
        """The paths with layer calls below them."""
        return frozenset(path[:k] for path in self for k in range(len(path)))


def layers_by_path(program: TracedModel) -> LayersByPath:
    """The distinct layers at each path, each with the layers that it calls in its own scope (`L.Scan` calls its block).

    A layer that is called several times at a path counts once. So does a layer that JAX traces twice, such as one in
    the body of a loop.
    """
    found: dict[paths.Path, dict[str, list[int]]] = {}
    for number in sorted(program.calls):
        call = program.calls[number]
        chains = found.setdefault(call.path, {})
        inside = call.parent in program.calls and program.calls[call.parent].path == call.path
        if not inside:
            chains.setdefault(repr(call.layer), [number])
        else:
            for chain in chains.values():
                if chain[-1] == call.parent:
                    chain.append(number)
                    break
    calls = program.calls
    return LayersByPath({path: [tuple(calls[n] for n in c) for c in chains.values()] for path, chains in found.items()})


def layer_label(path: paths.Path, calls: LayersByPath, copies: int = 1) -> str:
    """The layers at a path as text. A layer that calls another in its own scope reads "Scan of 12 × Block".

    The innermost layer is shown with its arguments (`source_text`). A layer around it, or one with layers at paths
    below, is shown by its class name. `copies` is the number of copies of the surrounding group; the label counts only
    copies beyond these.
    """
    container, labels = path in calls.above, []
    for chain in calls[path]:
        names, before = [], copies
        for call in chain:
            short = container or call is not chain[-1]
            name = source_text(call.layer, short)
            names.append(f"{call.copies // before} × {name}" if call.copies > before else name)
            before = max(before, call.copies)
        labels.append(" of ".join(names))
    return " + ".join(labels)


def source_text(value: Any, short: bool = False) -> str:
    """A layer as source code: leading options by position, functions by name, defaults left out.

    With `short`, only the class name.

    >>> from sapwood import layers as L
    >>> source_text(L.Dense(10)), source_text(L.Dense(4, axes=(None, "mlp"))), source_text(L.Dense(10), short=True)
    ('Dense(10)', "Dense(4, axes=(None, 'mlp'))", 'Dense')
    """
    if hasattr(value, "function"):
        return source_text(value.function)
    if not isinstance(value, Layer):
        return getattr(value, "__name__", None) or repr(value)
    if short or type(value).__repr__ is not Layer.__repr__:
        return type(value).__name__ if short else repr(value)
    shown, in_order = [], True
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        given = getattr(value, field.name)
        if not field.repr or (field.default is not dataclasses.MISSING and repr(given) == repr(field.default)):
            in_order = False
        else:
            shown.append(source_text(given) if in_order else f"{field.name}={source_text(given)}")
    return f"{type(value).__name__}({', '.join(shown)})"

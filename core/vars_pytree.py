"""`Vars` as a pytree: which parts of a cursor cross into a JAX transform.

The arrays always cross. The key crosses only in a cursor made by `fork`, `fold` or `stack`. The collector never
crosses, since effects belong to one trace. Each crossing of a key gets a new hash from `Ledger.cross`. JAX flattens
some arguments more than once for one call, so `_way` reads the call stack to tell a new crossing from a repeated one.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core.rng import ROOT, Ledger
from sapwood.core.traces import is_traced, manual_axes
from sapwood.core.vars import Vars, current_state

_JAX = str(Path(jax.__file__).parent) + os.sep
_LOOKS = {"debug_info", "_check_primal_refs"}
"""Functions of JAX that flatten arguments only to inspect them; the result enters no program."""
_TRACES = "cache_miss"
"""The function of `jax.jit` that runs if a call has no compiled program; it flattens the arguments a second time."""
_WRAPS = "reraise_with_filtered_traceback"
"""JAX's wrapper around that function and most others; `_way` skips its frames."""


class Static:
    """The static data of a flattened cursor: all fields that are no arrays.

    Two are equal if their `fields` are equal. The path is compared only during `spec` and if ``capture`` is a pattern;
    otherwise it is a label, so that equal blocks at different paths share one trace.
    """

    __slots__ = ("fields", "key", "label")

    def __init__(self, v: Vars, carry: bool):
        self.label = (v._path, v._stacked, v._scope, v._reads)
        alike, manual = (v._ledger.alike, manual_axes()) if carry and v._ledger else (frozenset(), frozenset())
        self.fields = (v._train, v._policy, v._place, v._capture, v._recorder, carry, v._own_params, v._own_state,
                       v._collected or v._collector is not None, v._frozen, v._keyless, alike, manual)  # fmt: skip
        by_path = v._recorder is not None or isinstance(v._capture, str)
        self.key = (self.fields, self.label[:3] if by_path else None)

    def __eq__(self, other):
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self):
        return hash(self.key[0][:2])


def flatten(v: Vars):
    """The children ``(params, state, key, start, level)`` of a cursor, and its `Static`."""
    key = start = level = None
    if v._carry and v._key is not None and not isinstance(v._key, jax.Array):  # a placeholder of JAX's
        key, start, level = v._key, v._start[0], None if v._ledger is None else v._ledger.level
    elif v._carry and (v := v._drawing())._key is not None and v._ledger is not None:
        # The hash and the level cross as arrays, because equal blocks at different paths share one trace.
        key, level, way = v._key, _word(v._ledger.level + 1), _way()
        start = tuple(map(_word, v._ledger.cross(v._path, v._hash(), *way) if way else v._hash()))
        if shape := np.shape(key):
            level = jnp.broadcast_to(level, shape) if is_traced(level) else np.broadcast_to(level, shape)
    return (v._params, current_state(v), key, start, level), Static(v, key is not None)


def _word(lane):
    return np.uint32(lane) if isinstance(lane, int) else lane


def _way() -> tuple | None:
    """Where a cursor is flattened: ``(caller, again)`` for `Ledger.cross`, or None if JAX only inspects its arguments.

    Both are tuples of ``(code, instruction offset)``, one for each frame of the call stack. ``caller`` has the frames
    from the transform up to the user's line. ``again`` has the frames inside of `_TRACES`, and is None outside of it.
    """
    frame, way, again = sys._getframe(2), [], None
    while frame is not None:
        ours, name = frame.f_code.co_filename.startswith(_JAX), frame.f_code.co_name
        if ours and name in _LOOKS:
            return None
        if not (ours and name == _WRAPS):
            way.append((frame.f_code, frame.f_lasti))
        if ours and name == _TRACES and again is None:
            again, way = tuple(way), []
        if not ours:
            break
        frame = frame.f_back
    return tuple(way), again


def unflatten(static: Static, children) -> Vars:
    """The cursor of a `Static` and of children. Its key, if one crossed, has a new ledger."""
    params, state, key, start, level = children
    path, stacked, scope, reads = static.label
    (train, policy, place, capture, recorder, carry, own_params, own_state, collected, frozen, keyless, alike,
     manual) = static.fields  # fmt: skip
    if carry:
        alike = (alike | _same_on(key, stacked, manual)) & manual_axes()
    return Vars(
        _params=params, _state=state, _key=key, _start=(start, len(path)) if carry else (ROOT, 0), _carry=carry,
        _ledger=Ledger(level=level, alike=alike) if carry else None, _path=path, _train=train, _policy=policy,
        _place=place, _capture=capture, _recorder=recorder, _stacked=stacked, _scope=scope, _reads=reads,
        _collected=collected, _own_params=own_params, _own_state=own_state, _frozen=frozen, _keyless=keyless,
    )  # fmt: skip


def _same_on(key: Any, stacked: tuple, manual: frozenset[str]) -> frozenset[str]:
    """The mesh axes of a `jax.shard_map` just entered along which devices may hold the same key.

    Devices hold different keys only if the key is stacked and split into as many parts as there are devices.
    """
    entered = manual_axes() - manual
    parts = stacked[-1].size // max(np.shape(key)[0], 1) if np.ndim(key) and stacked else 1
    devices = math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in entered)
    return entered if parts < devices else frozenset()


jax.tree_util.register_pytree_node(Vars, flatten, unflatten)

"""How a cursor crosses into a JAX transform: `Vars` as a pytree.

Its arrays go along, its key only from `fork`, `fold` or `stack`, its collector never: effects belong to one trace.
"""

import jax
import numpy as np

from sapwood.core.errors import EffectError
from sapwood.core.rng import ROOT, Ledger
from sapwood.core.vars import Vars, current_state


class Static:
    """The static half of a crossing cursor. In apply mode the path is a label only: equal blocks trace once."""

    __slots__ = ("fields", "key", "label", "level")

    def __init__(self, v: Vars, carry: bool):
        self.label = (v._path, v._stacked, v._scope, v._reads)
        self.fields = (v._train, v._policy, v._place, v._capture, v._recorder, carry, v._own_params, v._own_state,
                       v._collected or v._collector is not None, v._frozen)  # fmt: skip
        self.level = v._ledger.level if carry and v._ledger is not None else 0
        by_path = v._recorder is not None or isinstance(v._capture, str)
        self.key = (self.fields, self.level, self.label[:3] if by_path else None)

    def __eq__(self, other):
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self):
        return hash(self.key[0][:2])


def flatten(v: Vars):
    carry = v._carry and v._key is not None
    key = start = None
    if carry:  # the whole hash goes along: the path is a label, and equal blocks share one trace
        if v._ledger is not None and not v._ledger.cross(v._path):
            raise EffectError(
                f"{v._at()}: this cursor's key has been used here and would give the same numbers again inside; "
                "v.fork() for each crossing into a transform"
            )
        key, start = v._key, tuple(np.uint32(lane) if isinstance(lane, int) else lane for lane in v._hash())
    return (v._params, current_state(v), key, start), Static(v, carry)


def unflatten(static: Static, children) -> Vars:
    params, state, key, start = children
    path, stacked, scope, reads = static.label
    train, policy, place, capture, recorder, carry, own_params, own_state, collected, frozen = static.fields
    return Vars(
        _params=params, _state=state, _key=key, _start=(start, len(path)) if carry else (ROOT, 0), _carry=carry,
        _ledger=Ledger(level=static.level + 1) if carry else None, _path=path, _train=train, _policy=policy,
        _place=place, _capture=capture, _recorder=recorder, _stacked=stacked, _scope=scope, _reads=reads,
        _collected=collected, _own_params=own_params, _own_state=own_state, _frozen=frozen,
    )  # fmt: skip


jax.tree_util.register_pytree_node(Vars, flatten, unflatten)

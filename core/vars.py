"""`Vars`: an immutable cursor into two explicit trees, `params` and `state`.

A cursor holds a path and the parts of the two trees below that path. Reading works in every JAX trace. `put`, `loss`,
`sow` and `check` write to the `Collector` of the run, and only in the trace of that run. `rng` draws from the key of
the run, and only in the trace that the key belongs to. Cursors hold the collector and the recorder by weak references,
so a cursor that outlives its run raises instead of writing to it. `vars_pytree` lists the fields that pass into a JAX
transform. A new field of `_DEFAULTS` that is not listed there gets its default inside of a transform.
"""

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from sapwood.core import messages, paths
from sapwood.core.declare import Recorder, concrete_shape, stacked_param, storage_dtype
from sapwood.core.effects import Collector, Updates, raise_if_failed
from sapwood.core.errors import ConfigError, DeclarationError, EffectError
from sapwood.core.param import Stacked
from sapwood.core.policy import Policy, as_policy
from sapwood.core.rng import INDEX, ROOT, Ledger, as_key, fold, fold_once, mix, path_hash
from sapwood.core.traces import belongs_here, current_trace, home, inside, is_condition, is_traced, repeats

_DEFAULTS: dict[str, Any] = {
    "_params": {},  # the parameters bound at this place and below
    "_state": {},
    "_path": (),
    "_own_params": True,  # True for the run's own tree, False for one passed to `replace`
    "_own_state": True,
    "_train": False,
    "_policy": Policy(),
    "_place": None,  # function (axes, shape) -> sharding of an activation, made by `sapwood.parallel`
    "_capture": False,  # which sown values are kept: True (all), False (none), or a path pattern
    "_key": None,
    "_start": (ROOT, 0),  # (hash, n): the hash of the first n names of the path; the hash may be traced
    "_carry": False,  # True if the key crosses into a transform together with the cursor
    "_keyless": "",  # the reason why the key was dropped, for error messages; empty if it was not dropped
    "_ledger": None,
    "_collector": None,  # weak reference to the collector of the run's effects
    "_collected": False,  # True once there was a collector: an effect after it is gone is an error
    "_reads": None,  # set of (kind, path) that the run has read, kept by `apply`
    "_recorder": None,  # weak reference to the recorder of `spec`
    "_stacked": (),  # the dimensions that `stack` added, outermost first
    "_frozen": False,  # what is frozen here and below: True (all), False (nothing), or pairs (child, the same for it)
    "_scope": 0,  # how many names of the path the enclosing layers have already put into the profile's scope
    "_lost": None,  # (path, names): where the path left the tree of parameters, and the names that exist there
}
_METHODS = (
    "param", "state", "put", "rng", "loss", "sow", "check", "shard", "replace", "fork", "fold", "stack", "merge",
)  # fmt: skip
_NONE = (
    "needs a key: pass rng= to sw.apply or sw.bind; a cursor takes its key into a transform by v.fork(), v.fold(i) or "
    "v.stack(n)"
)
_CALL = (
    "its key belongs to another JAX trace, and JAX may run what it traces here for several uses, which would get the "
    "same numbers. Pass it in as an argument: jax.jit(f)(v.fork(), x), likewise for checkpoint, cond and shard_map, "
    "or use L.Remat"
)
_CARRY = (
    "its key belongs to another JAX trace, and every step would get the same numbers. Carry it through the loop: "
    "jax.lax.scan(lambda w, x: (w, f(w, x)), v.fork(), xs), and likewise for while_loop and fori_loop, or use L.Scan"
)
_OPERAND = {
    "jax.vmap": "its key belongs to another JAX trace, and every row would get the same numbers. Give each its own: "
    'jax.vmap(lambda key, x: f(v.replace(rng=key), x))(jax.random.split(v.rng("rows"), n), x); v.stack(n) where the '
    "variables have a row each, or L.Vmap",
    "jax.lax.scan": _CARRY,
    "jax.lax.while_loop": _CARRY,
    "jax.lax.fori_loop": _CARRY,
}  # error messages, by the transform whose trace the draw is in
_SHARED = (
    "rng= is a key from outside of {0}, which would give every row or step the same numbers. Pass a key for each into "
    "{0}: jax.random.split(key, n); for the same numbers in all, jnp.broadcast_to(key, (n,))"
)


class Vars:
    """An immutable cursor into ``params`` and ``state``; `v.name`, ``v["name"]`` and ``v[3]`` are the places below it.

    `sw.bind`, `sw.apply`, `sw.pure`, `sw.init` and `sw.spec` make cursors; users never construct one. A cursor is a
    pytree, so it passes into JAX transforms. Its effects (``put``, ``rng``, ``loss``, ``sow``, ``check``) work only in
    the trace of the run that collects them, and raise `EffectError` elsewhere. Reading works everywhere.
    """

    __slots__ = tuple(_DEFAULTS)

    _params: dict
    _state: dict
    _path: paths.Path
    _own_params: bool
    _own_state: bool
    _train: bool
    _policy: Policy
    _place: Callable | None
    _capture: bool | str
    _key: jax.Array | None
    _start: tuple[Any, int]
    _carry: bool
    _keyless: str
    _ledger: Ledger | None
    _collector: weakref.ref[Collector] | None
    _collected: bool
    _reads: set | None
    _recorder: weakref.ref[Recorder] | None
    _stacked: tuple[Stacked, ...]
    _frozen: Any
    _scope: int
    _lost: tuple[paths.Path, tuple[str, ...]] | None

    def __init__(self, **fields: Any) -> None:
        for name, default in _DEFAULTS.items():
            object.__setattr__(self, name, fields.get(name, default))

    def _with(self, **changes) -> "Vars":
        new = object.__new__(Vars)
        for name in _DEFAULTS:
            object.__setattr__(new, name, changes[name] if name in changes else getattr(self, name))
        return new

    # ---- places -------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> "Vars":
        if name.startswith("_"):
            raise AttributeError(f"{name!r}: names in a tree of variables do not start with an underscore")
        return self._child(name)

    def __getitem__(self, name: str | int) -> "Vars":
        if isinstance(name, int | np.integer) and not isinstance(name, bool) and name >= 0:
            return self._child(str(int(name)))
        if not isinstance(name, str):
            hint = "; a traced index needs v.stack(n) and a scan" if is_traced(name) else ""
            raise DeclarationError(f"{self._at()}: a child's name is a string or an integer from 0, not {name!r}{hint}")
        return self._child(name)

    def _child(self, name: str) -> "Vars":
        lost = self._lost
        if lost is None and self._params and name not in self._params:
            lost = (self._path, tuple(self._params))
        return self._with(
            _params=self._below("params", name), _state=self._below("state", name), _path=self._full(name), _lost=lost,
            _frozen=self._frozen if isinstance(self._frozen, bool) else dict(self._frozen).get(name, False),
        )  # fmt: skip

    def _below(self, kind: str, name: str) -> dict:
        tree = self._params if kind == "params" else self._state
        below = tree.get(name, {})
        if not isinstance(below, dict):
            raise DeclarationError(
                f"{paths.join((*self._path, name))} is a variable in {kind} (shape {jnp.shape(below)}) and is used as "
                f"a scope: v.{kind.removesuffix('s')}({name!r}, shape, init) reads it; if both are meant, give one of "
                "the two another name"
            )
        return below

    def _full(self, name: str) -> paths.Path:
        if not name or name.startswith("_") or "/" in name:
            raise DeclarationError(
                f"{self._at()}: {name!r} cannot name a variable or a scope: names are not empty, do not start with an "
                "underscore and hold no slash"
            )
        return (*self._path, name)

    def _at(self) -> str:
        return paths.join(self._path)

    # ---- reading ------------------------------------------------------------------------------------------------

    @property
    def train(self) -> bool:
        """True in a training run: dropout drops, and batch norm uses the statistics of the batch."""
        return self._train

    @property
    def policy(self) -> Policy:
        """The precision of this run."""
        return self._policy

    def param(
        self, name: str, shape: Sequence[int], init: Callable[..., Any], *, axes: Sequence[str | None] | None = None,
        dtype: Any = None, cast: bool = True,
    ) -> jax.Array:  # fmt: skip
        """Declare and read a parameter.

        Args:
            name: its name at this place; not empty, without a slash or a leading underscore.
            shape: its shape, of plain integers.
            init: ``init(key, shape, dtype)`` makes its first value.
            axes: its logical axis names, one or None for each dimension; None gives no names.
            dtype: the dtype it is stored in; None is the policy's ``param`` dtype.
            cast: True returns it in the policy's compute dtype, False as stored.

        Raises:
            DeclarationError: the bound array has another shape, or nothing is bound outside of `sw.spec` and `sw.init`.
        """
        value = self._variable("params", name, shape, init, axes, dtype or self._policy.param)
        value = self._policy.cast(value) if cast else value
        gather = getattr(self._place, "gather", None)  # the mesh's own way to gather the shards of a parameter
        return value if gather is None else gather(value, None if axes is None else tuple(axes))

    def state(self, name: str, shape: Sequence[int], init: Callable[..., Any], *, dtype: Any = None) -> jax.Array:
        """Declare and read a state entry. It is returned in the dtype it is stored in.

        Args:
            name: its name at this place; not empty, without a slash or a leading underscore.
            shape: its shape, of plain integers.
            init: ``init(key, shape, dtype)`` makes its first value.
            dtype: the dtype it is stored in; None is float32.

        Raises:
            DeclarationError: the bound array has another shape, or nothing is bound outside of `sw.spec` and `sw.init`.
        """
        return self._variable("state", name, shape, init, None, dtype or "float32")

    def _variable(self, kind: str, name: str, shape, init, axes, dtype) -> Any:
        path = self._full(name)
        shape, dtype = concrete_shape(shape, path), storage_dtype(dtype, path)
        if axes is not None and len(axes) != len(shape):
            raise DeclarationError(f"{paths.join(path)}: axes {axes} name {len(axes)} dimensions, the shape is {shape}")
        value = self._bound(kind, name)
        if value is None:
            value = self._missing(kind, path, (shape, dtype, init, axes))
        if isinstance(value, dict):
            raise DeclarationError(
                f"{paths.join(path)} is declared as a variable of shape {shape}, but {kind} holds a scope there with "
                f"{', '.join(sorted(value)) or 'nothing in it'}"
            )
        if not isinstance(value, jax.Array):
            value = _as_array(value, f"{kind} {paths.join(path)}")
        if value.shape != shape:
            raise DeclarationError(
                f"{kind} {paths.join(path)}: the model declares shape {shape}, the bound array has {value.shape}"
            )
        self._note_read(kind, path)
        if kind == "state" and (collector := self._collecting()) and self._own_state:
            collector.declared[path] = (shape, value.dtype)
        return value

    def _bound(self, kind: str, name: str) -> Any:
        """The value of a variable, or None if nothing is bound. A value that this run has `put` comes first."""
        tree = self._params if kind == "params" else self._state
        if kind == "state" and self._own_state and (collector := self._collecting()):
            put = collector.state.get((*self._path, name))
            if put is not None:
                return put
        return tree.get(name)

    def _missing(self, kind: str, path: paths.Path, declared: tuple) -> Any:
        """Handle a variable that is not bound.

        `spec` records the declaration and gets a placeholder. A data-dependent `init` makes the first value. Any other
        run raises `DeclarationError`.
        """
        shape, dtype, init, axes = declared
        if self._recorder is not None:
            recorder: Recorder | None = self._recorder()
            if recorder is None:
                raise EffectError(f"{self._at()}: this cursor outlived the sw.spec that made it")
            axes = None if axes is None else tuple(axes)
            recorder.declare(kind, path, stacked_param(shape, dtype, init, axes, self._stacked))
            return jax.lax.empty(shape, dtype)  # only the shape is used here; zeros would take five times as long
        collector = self._collecting()
        if collector is not None and collector.init_key is not None:
            self._guard(f"the data-dependent initialiser of {path[-1]!r}")
            if (kind, path) not in collector.fresh:
                key = fold(collector.init_key, path_hash(path))
                collector.fresh[kind, path] = jnp.asarray(init(key, shape, dtype), dtype)
            return collector.fresh[kind, path]
        tree, at, wanted = (self._params if kind == "params" else self._state), self._path, path[-1]
        if kind == "params" and self._lost:
            at, tree = self._lost
            wanted = path[len(at)]
        hint = messages.nearest(wanted, tree)
        if tree and paths.is_index(wanted):
            hint = "; a scanned stack becomes an unrolled one by sw.unstack"
        raise DeclarationError(
            f"{kind} has no {paths.join(path)!r} (shape {shape}, {dtype}); at {paths.join(at)!r} it holds "
            f"{', '.join(sorted(tree, key=paths.order)) or 'nothing'}{hint}"
        )

    def _note_read(self, kind: str, path: paths.Path) -> None:
        if self._reads is not None and (self._own_params if kind == "params" else self._own_state):
            self._reads.add((kind, path))

    # ---- effects ------------------------------------------------------------------------------------------------

    def _collecting(self) -> Collector | None:
        return None if self._collector is None else self._collector()

    def _guard(self, what: str) -> Collector:
        """The collector of this run. Outside of its trace, raises an `EffectError` that says what to do."""
        collector = self._collecting()
        if collector is not None and collector.trace == current_trace():
            return collector
        if collector is None and not self._collected:
            why = "nothing collects it here: run the model with sw.apply(f, params, state, ...) or sw.pure(f)(v, ...)"
        else:
            why = (
                "it belongs to another JAX trace (jit, grad, vmap, scan, cond, checkpoint, ...) and would be lost or "
                "leak; wrap the inner function in sw.pure, return its updates and v.merge(updates) outside, or use the "
                "lifted L.Scan, L.Vmap, L.Remat"
            )
        raise EffectError(f"{self._at()}: {what} cannot work: {why}")

    def put(self, **values: Any) -> None:
        """Set the next value of state entries, by name. The run returns it in its next state.

        A value must have the declared shape, and is cast to the declared dtype.

        Raises:
            EffectError: called outside of the collecting trace, or on a cursor whose state was replaced.
            DeclarationError: the entry was not declared, or the value has another shape or kind of dtype.
        """
        for name, value in values.items():
            path = self._full(name)
            collector = self._guard(f"put({name}=...)")
            if not self._own_state:
                raise EffectError(
                    f"{self._at()}: put({name}=...) on a cursor whose state was replaced would be lost; wrap the call "
                    "in sw.pure and take updates.state"
                )
            if path not in collector.declared:
                raise DeclarationError(
                    f"put({name}=...) at {self._at()!r}: declare it first with v.state({name!r}, shape, init)"
                )
            shape, dtype = collector.declared[path]
            value = jnp.asarray(value)
            if value.shape != shape or not jnp.can_cast(value.dtype, dtype, "same_kind"):
                raise DeclarationError(
                    f"put({name}=...) at {self._at()!r}: declared {dtype}{list(shape)}, got {value.dtype}"
                    f"{list(value.shape)}; a state entry keeps its shape and dtype"
                )
            if self._recorder is None or self._bound("state", name) is not None:
                collector.state[path] = value.astype(dtype)

    def rng(self, name: str) -> jax.Array:
        """A new random key, derived from the run's key, this path and ``name``. No two calls return the same key.

        Raises:
            EffectError: no key is bound, the key belongs to another trace, the cursor is stacked, the call is in the
                condition of a ``while_loop``, or devices of a `jax.shard_map` would get the same numbers.
        """
        self._full(name)
        v = self._drawing()
        if v._key is None or v._ledger is None:
            why = f"cannot draw: {v._keyless}" if v._keyless else _NONE
            raise EffectError(f"{self._at()}: rng({name!r}) {why}")
        if jnp.ndim(v._key):
            raise EffectError(
                f"{self._at()}: rng({name!r}) on a stacked cursor; pass it through jax.vmap or jax.lax.scan first"
            )
        if is_condition():
            raise EffectError(
                f"{self._at()}: rng({name!r}) in the condition of a while_loop would give what its body draws: draw in "
                "the body, and carry what the condition needs"
            )
        if v._ledger.alike:
            axis = min(v._ledger.alike)
            raise EffectError(
                f"{self._at()}: rng({name!r}) would give each device along {axis!r} the same numbers: "
                f"v.fold(jax.lax.axis_index({axis!r})) for its own; v.replace(rng=key) with a key of the function's "
                "arguments for the same on all"
            )
        return fold_once(v._key, v._ledger.draw(self._path, name, self._hash()))

    def _drawing(self) -> "Vars":
        """This cursor, without its key if the key belongs to another trace. Reading still works; a draw then raises."""
        if self._key is None or self._ledger is None:
            return self
        made = self._ledger.trace
        if made == home() if made is not None else belongs_here(self._key):
            return self
        return self._with(_key=None, _ledger=None, _carry=False, _keyless=_OPERAND.get(inside(), _CALL))

    def _hash(self):
        start, depth = self._start
        return path_hash(self._path[depth:], start)

    def loss(self, name: str, x: Any) -> None:
        """Report an auxiliary loss, a scalar that is added to the objective.

        Raises:
            DeclarationError: ``x`` is no scalar.
            EffectError: called outside of the collecting trace.
        """
        path, collector = self._full(name), self._guard(f"loss({name!r})")
        if jnp.ndim(x) != 0:
            raise DeclarationError(f"loss({name!r}) at {self._at()!r}: a scalar is expected, got shape {jnp.shape(x)}")
        collector.loss(path, x)

    def sow(self, name: str, x: Any) -> None:
        """Report an intermediate value. The run returns it if its ``capture`` covers this path, else it is ignored."""
        path = self._full(name)
        if not self._captures(path) or (self._collector is None and not self._collected):
            return
        self._guard(f"sow({name!r})").sow(path, x)

    def _captures(self, path: paths.Path) -> bool:
        if isinstance(self._capture, bool):
            return self._capture
        unrolled = path
        for s in reversed(self._stacked):  # blocks/attn in a scanned stack also matches blocks/*/attn
            unrolled = (*unrolled[: s.depth], "0", *unrolled[s.depth :])
        return any(paths.matches(self._capture, "/".join(p)) for p in (path, unrolled))

    def check(self, ok: Any, message: str) -> None:
        """Check values: ``ok`` is a boolean array, True for every entry that is acceptable.

        If ``ok`` is known and an entry is False, a `CheckError` that names the first bad entry is raised at once. If
        ``ok`` is traced, the run returns one bit on the device for each message.
        """
        if self._collector is None and not self._collected:  # a raw dict or a bare bind has no collector
            return None if is_traced(ok) else raise_if_failed(self._path, message, ok)
        self._guard(f"check({message!r})").check(self._path, message, ok)

    def shard(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Constrain the sharding of an activation by its logical axes, one name or None for each dimension.

        Without a mesh, ``x`` is returned unchanged. Raises `DeclarationError` if the number of names is not that of
        the dimensions.
        """
        if len(axes) != jnp.ndim(x):
            raise DeclarationError(
                f"{self._at()}: shard got {len(axes)} axis names {axes} for an array of shape {jnp.shape(x)}"
            )
        recorder = None if self._recorder is None else self._recorder()
        if recorder is not None and recorder.on_shard is not None:
            recorder.on_shard(self, x, axes)
        sharding = self._place(axes, jnp.shape(x)) if self._place else None
        return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)

    # ---- the same cursor with other bindings --------------------------------------------------------------------

    def replace(
        self, *, params: Any = None, state: Any = None, rng: Any = None, train: bool | None = None, policy: Any = None
    ) -> "Vars":
        """The same cursor with other variables, key, mode or precision. None keeps what is bound.

        Args:
            params: nested dict of the parameters at this cursor and below.
            state: nested dict of the state at this cursor and below. ``put`` on a replaced state needs `sw.pure`.
            rng: random key or integer seed. If the key comes from outside of a surrounding `jax.vmap` or loop, a draw
                raises `EffectError`, since every row or step would get the same numbers.
            train: True for a training run.
            policy: a `Policy` or the name of a compute dtype.
        """
        changes: dict[str, Any] = {}
        if params is not None:
            changes.update(_params=_tree(params, "params"), _own_params=False, _lost=None)
        if state is not None:
            changes.update(_state=_tree(state, "state"), _own_state=False)
        if rng is not None:
            changes.update(_key=as_key(rng), _start=(ROOT, 0), _carry=False, _ledger=Ledger(home()), _keyless="")
            if around := repeats(rng):
                changes.update(_key=None, _ledger=None, _keyless=_SHARED.format(around))
        if train is not None:
            changes["_train"] = bool(train)
        if policy is not None:
            changes["_policy"] = as_policy(policy)
        return self._with(**changes)

    def _branch(self, start, alike: frozenset[str] | None = None) -> "Vars":
        """A cursor with a new ledger, whose key crosses into a transform together with it."""
        assert self._ledger is not None, "a key always has a ledger"
        ledger = Ledger(home(), self._ledger.level + 1, alike=self._ledger.alike if alike is None else alike)
        return self._with(_carry=True, _ledger=ledger, _start=(start, len(self._path)))

    def fork(self) -> "Vars":
        """A cursor that takes its key into a JAX transform. Pass it as an argument of the transformed function.

        Each fork draws other numbers. Inside the function the cursor draws, forks and folds. If the function returns
        it, as a loop does with its carry, it continues with new numbers. If this cursor's key belongs to another trace,
        the fork has no key: reading works, and a draw raises `EffectError`.

        >>> from sapwood import bind
        >>> step = lambda w, x: (w, jax.random.bits(w.rng("mask")))
        >>> masks = jax.lax.scan(step, bind({}, rng=0).fork(), jnp.arange(3))[1]
        >>> len(set(masks.tolist()))
        3
        """
        v = self._drawing()
        if v._key is None or v._ledger is None:
            return v
        return v._branch(v._ledger.fork(v._path, v._hash()))

    def fold(self, i: Any) -> "Vars":
        """A cursor with the key of step ``i``, for loops whose steps share variables.

        ``i`` is an integer from -2**63 to 2**63 - 1 and may be traced; anything else raises `ConfigError`. Pass the
        cursor into the loop as an argument, as with `fork`.
        """
        v = self._drawing()
        if v._key is None or v._ledger is None:
            return v
        i = _step(i, self)
        alike = v._ledger.alike if isinstance(i, int) else frozenset()
        return v._branch(v._ledger.fold(v._path, i, v._hash()), alike)

    def stack(self, n: int, axis: str | None = "layers") -> "Vars":
        """A cursor over ``n`` stacked copies of everything below it, the random key included.

        Every leaf has a leading dimension of size ``n``. Pass the cursor through `jax.vmap` or `jax.lax.scan` along
        that dimension. ``axis`` is the logical name of the dimension. Raises `DeclarationError` if a leaf has another
        leading size.
        """
        n = concrete_shape(n, self._path)[0]
        for kind, tree in (("params", self._params), ("state", self._state)):
            for path, leaf in paths.leaves(tree, self._path):
                if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != n:
                    raise DeclarationError(
                        f"{kind} {paths.join(path)} has shape {jnp.shape(leaf)}; stack({n}) expects {n} along its "
                        "first dimension (sw.stack and sw.unstack convert between scanned and unrolled trees)"
                    )
        v = self._drawing()._with(_stacked=(*self._stacked, Stacked(len(self._path), n, axis)))
        if v._key is None or v._ledger is None:
            if v._keyless and not (v._params or v._state):
                raise EffectError(f"{self._at()}: stack({n}) holds no variables and cannot hold keys: {v._keyless}")
            return v
        start = v._ledger.fork(v._path, v._hash())
        lanes = mix(start, (np.arange(n, dtype=np.uint32), INDEX))  # the hashes of the names 0, 1, ..., n - 1
        return v._with(_key=jnp.broadcast_to(v._key, (n,)))._branch(lanes)

    def merge(self, updates: Updates | dict) -> None:
        """Add to this run what `sw.pure` returned for this cursor: its `Updates`, or its state dict with ``full=True``.

        A raw dict or a bare bind has no collector. There, updates with state or losses raise `EffectError`, and a
        failed check with known values raises `CheckError`.

        Raises:
            EffectError: called outside of the collecting trace, or with state on a cursor whose state was replaced.
            DeclarationError: a state entry has another shape or dtype than before.
        """
        state, losses, captured, checks = (updates, {}, {}, {}) if isinstance(updates, dict) else updates
        if self._collector is None and not self._collected and not (state or losses):
            for path, ok in paths.leaves(checks, self._path):
                if not is_traced(ok):
                    raise_if_failed(path[:-1], path[-1], ok)
            return
        collector = self._guard("merge(updates)")
        if state and not self._own_state:
            raise EffectError(f"{self._at()}: merge into a cursor whose state was replaced would be lost")
        for path, value in paths.leaves(state, self._path):
            self._refuse_reshaped(path, value, collector)
            collector.state[path] = value
        for path, value in paths.leaves(losses, self._path):
            collector.loss(path, value)
        for path, value in paths.leaves(captured, self._path):
            collector.sow(path, value)
        for path, ok in paths.leaves(checks, self._path):
            collector.check(path[:-1], path[-1], ok)

    def _refuse_reshaped(self, path: paths.Path, value: Any, collector: Collector) -> None:
        """Raise `DeclarationError` if a merged state entry changes its shape or dtype."""
        old = paths.subtree(self._state, path[len(self._path) :])
        old = collector.fresh.get(("state", path)) if isinstance(old, dict) else old
        if old is not None and (jnp.shape(old), jnp.result_type(old)) != (jnp.shape(value), jnp.result_type(value)):
            raise DeclarationError(
                f"merge(updates): state {paths.join(path)} is {jnp.result_type(old)}{list(jnp.shape(old))}, the update "
                f"{jnp.result_type(value)}{list(jnp.shape(value))}; a state entry keeps its shape and dtype: "
                "v.stack(n) gives each row or step its own; or reduce the update first (jax.tree.map over "
                "updates.state)"
            )

    # ---- hygiene ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        held = sorted({*self._params, *self._state}, key=paths.order)
        return f"Vars({self._at()}: {', '.join(held) or 'empty'})"

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a cursor is immutable; v.put({name}=value) hands back a state entry's next value")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __setitem__(self, name: str, value: Any) -> None:
        self.__setattr__(name, value)

    def __copy__(self) -> "Vars":
        return self  # immutable

    def __deepcopy__(self, memo: Any) -> "Vars":
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a cursor is not saved; save the plain dicts sw.params(v) and sw.state(v)")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self._path[-1] if self._path else "v"
        raise TypeError(f"{self._at()!r} is a place in a tree, not a function{messages.nearest(name, _METHODS)}")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(f"a cursor has no {what}: it is a place in a tree of variables; sw.params(v) and sw.state(v) "
                        "give the plain dicts")  # fmt: skip

    def __iter__(self) -> Iterator[Any]:
        self._refuse("iteration")

    def __contains__(self, name: object) -> bool:
        self._refuse("'in'")

    def __bool__(self) -> bool:
        self._refuse("truth value")

    def __len__(self) -> int:
        self._refuse("length")


def _refuse_arithmetic(self: Vars, *others: Any) -> NoReturn:
    raise TypeError(f"{self._at()!r} is a place in a tree, not an array; v.param(name, shape, init) reads one")


for _operator in ("add", "sub", "mul", "matmul", "truediv", "pow"):
    setattr(Vars, f"__{_operator}__", _refuse_arithmetic)
    setattr(Vars, f"__r{_operator}__", _refuse_arithmetic)


def _tree(tree: Any, what: str) -> dict:
    if isinstance(tree, Vars):
        raise TypeError(f"{what} must be a nested dict of arrays, got a cursor; use sw.{what}(v)")
    if not isinstance(tree, dict):
        raise TypeError(f"{what} must be a nested dict of arrays, got {type(tree).__name__}")
    return tree


def _as_array(value: Any, where: str) -> jax.Array:
    try:
        return jnp.asarray(value)
    except TypeError:
        raise DeclarationError(
            f"{where} holds {type(value).__name__}, an array is expected; sw.spec only describes variables, sw.init "
            "makes them"
        ) from None


def _step(i: Any, v: Vars) -> Any:
    """The ``i`` of `fold`: a Python integer if it is known, else the traced integer. Raises `ConfigError`."""
    if is_traced(i) and jnp.ndim(i) == 0 and jnp.issubdtype(i.dtype, jnp.integer) and i.dtype != "uint64":
        return i
    try:
        step = operator.index(i)
    except TypeError:
        step = None
    if step is None or isinstance(i, bool | np.bool_) or not -(2**63) <= step < 2**63:
        raise ConfigError(f"{v._at()}: fold(i) takes one integer from -2**63 to 2**63 - 1, got {i!r}")
    return step


def as_vars(v: Any, user: Any = None) -> Vars:
    """Return a cursor unchanged, and make one from a raw dict, which then serves as both params and state.

    Anything else raises a `TypeError` that names ``user``, the layer or function that was called.
    """
    if isinstance(v, Vars):
        return v
    if isinstance(v, dict):
        return Vars(_params=v, _state=v)
    raise TypeError(
        f"{user!r} takes its variables first, then its inputs: expected a cursor or a dict of arrays, "
        f"got {type(v).__name__}{list(v.shape) if hasattr(v, 'shape') else ''}"
    )


def is_declaring(v: Vars) -> bool:
    """True if this run declares variables (`spec`) or makes their first values (`init`).

    Such a run needs no mesh and no named axis.
    """
    collector = v._collecting()
    return v._recorder is not None or (collector is not None and collector.init_key is not None)


def frozen(v: Vars) -> bool:
    """True if the trainer trains no parameter at this cursor or below it.

    A scope without parameters has the answer of the scope around it. In a frozen scope, a layer whose state follows its
    batches, such as `BatchNorm`, keeps its state and computes as in evaluation. Nothing else changes: dropout drops,
    and ``v.train`` keeps its value. The trainer discards values that are put into a frozen scope.

    >>> frozen(as_vars({"kernel": jnp.ones(2)}))
    False
    """
    return as_vars(v, frozen)._frozen is True


def current_state(v: Vars) -> dict:
    """The state at a cursor as a plain dict, with the values that this run has put so far."""
    collector = v._collecting()
    if collector is None or not v._own_state:
        return v._state
    depth = len(v._path)
    puts = ((path[depth:], value) for path, value in collector.state.items() if path[:depth] == v._path)
    return paths.overlay(v._state, paths.nest(puts))


def with_collector(v: Vars, init_key: jax.Array | None = None) -> tuple[Vars, Collector]:
    """The same cursor with a new `Collector` in the current trace, and that collector.

    The caller keeps the collector alive: cursors hold it weakly. ``init_key`` is the key of a data-dependent `init`.
    """
    collector = Collector(v._path, current_trace(), init_key)
    inner = v._with(  # it keeps its key, which crosses into another transform only by a new fork
        _state=current_state(v), _collector=weakref.ref(collector), _collected=True, _own_state=True, _carry=False
    )
    return inner, collector

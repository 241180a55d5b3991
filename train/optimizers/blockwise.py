"""An optimizer that sees a scanned stack as its blocks.

Many optimizers look at a parameter's rank, norm, shape or name: Muon and a mask for weight decay at its rank, LAMB and
LARS at its norm, Adafactor at its shape. A scanned stack holds a parameter of all its blocks in one array, whose rank,
norm and shape are no block's. So the optimizer is given the unrolled model's tree, and sums over that tree are what
they were. Parameters, gradients and the optimizer's state stay stacked; `core.rolled` says how the program stays short.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from sapwood.core.errors import ConfigError
from sapwood.core.unrolled_trees import Stacks, View, blocks_of, stacks
from sapwood.train.optimizers.elementwise import is_elementwise
from sapwood.train.optimizers.stacked_program import rolled


def blockwise(optimizer: Any, params: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer for stacked parameters, doing to each block what it would do to the unrolled model's.

    `Trainer` does this by itself; it is for loops of one's own over models with `L.Scan` or `L.Vmap`. The state has the
    structure that the optimizer gives it, with the leaves of all blocks in one where they are alike: Adam's is the same
    as without, and `parallel.opt_shardings` takes it. Functions among the extra arguments of ``update``, such as
    ``value_fn``, are given and give back stacked parameters, and so may other arguments be.

    Args:
      optimizer: any optax transformation.
      params: the tree of `Param` of ``sw.spec(...).params``, or the part of it that trains.

    >>> import jax.numpy as jnp, sapwood as sw
    >>> from sapwood import layers as L
    >>> model = lambda v, x: L.Scan(L.Dense(3), 4)(v.blocks, x)
    >>> params, _ = sw.init(model, 0, jnp.ones((2, 3)))
    >>> matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    >>> decay = optax.add_decayed_weights(1.0, mask=matrices)          # biases are of rank 2 in the stack
    >>> optimizer = blockwise(decay, sw.spec(model, jnp.ones((2, 3))).params)
    >>> ones = jax.tree.map(jnp.ones_like, params)
    >>> updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(ones), ones)
    >>> jax.tree.map(lambda x: float(x.max()), updates)["blocks"]
    {'bias': 0.0, 'kernel': 1.0}
    """
    return seen(optimizer, stacks(params))


def seen(optimizer: Any, stacks: Stacks) -> optax.GradientTransformationExtraArgs:
    """`blockwise` for what `stacks` gave; the optimizer itself where nothing is stacked or it is elementwise."""
    optimizer = optax.with_extra_args_support(optimizer)
    if not stacks or is_elementwise(optimizer):
        return optimizer
    blocks = _Blocks(optimizer, stacks)
    return Blockwise(blocks.init, blocks.update)


class Blockwise(optax.GradientTransformationExtraArgs):
    """What `blockwise` gives; `parallel.opt_shardings` knows it by `blocks`."""

    @property
    def blocks(self) -> tuple[Any, Stacks]:
        """The optimizer, and what is stacked."""
        return self.init.__self__.optimizer, self.init.__self__.stacks  # type: ignore[attr-defined]


class _Blocks:
    def __init__(self, optimizer: Any, stacks: Stacks):
        self.optimizer, self.stacks = optimizer, stacks

    def init(self, params: Any) -> Any:
        return self._run(self.optimizer.init, [self._view(params)], params)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        given = self._view(updates)
        views = [given, self._state_view(state, updates if params is None else params), View(None, ())]
        if params is not None:
            views[2] = self._view(params)
        views += [given for x in extra.values() if jax.tree.structure(x) == given.stacked]

        beside = {name: x for name, x in extra.items() if jax.tree.structure(x) == given.stacked}
        rest = {name: _between(x, given) if callable(x) else x for name, x in extra.items() if name not in beside}

        def run(updates: Any, state: Any, params: Any, *trees: Any) -> Any:
            return self.optimizer.update(updates, state, params, **rest, **dict(zip(beside, trees, strict=True)))

        return self._run(run, views, updates, state, params, *beside.values())

    def _view(self, params: Any) -> View:
        return View(blocks_of(params, self.stacks), self.stacks)

    def _state_view(self, state: Any, params: Any) -> View:
        """How the optimizer's state lies. ConfigError for a state that is no such."""
        view = View(jax.eval_shape(self.optimizer.init, blocks_of(params, self.stacks)), self.stacks)
        given = [np.shape(x) for x in jax.tree.leaves(state)]
        if jax.tree.structure(state) != view.stacked or given != view.shapes:
            raise ConfigError(
                "the optimizer's state does not fit its parameters, which are stacked: the optimizer is given the "
                "blocks of each stack, so its state is made by Trainer.init, or by blockwise(optimizer, params).init"
            )
        return view

    def _run(self, function: Callable[..., Any], views: list[View], *trees: Any) -> Any:
        if all(slot.stack is None for view in views for slot in view.slots):  # what trains is no stack
            return function(*trees)
        if not jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return rolled(function, views, self.stacks)(*trees)
        result = function(*(view.unfold(tree) for view, tree in zip(views, trees, strict=True)))  # arrays to look at
        return View(result, self.stacks).fold(result)


def _between(function: Callable[..., Any], view: View) -> Callable[..., Any]:
    """A function of stacked parameters as one of unrolled ones; what else it takes and gives is as it is."""

    def run(*args: Any, **options: Any) -> Any:
        result = function(*map(stacked, args), **{name: stacked(x) for name, x in options.items()})
        return unrolled(result)

    def stacked(x: Any) -> Any:
        return view.fold(x) if jax.tree.structure(x) == view.unrolled else x

    def unrolled(x: Any) -> Any:
        return view.unfold(x) if jax.tree.structure(x) == view.stacked else x

    return run

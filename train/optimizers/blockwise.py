"""`blockwise`: an optimizer for scanned models that treats each block of a stack as in the unrolled model.

Many optimizers depend on a parameter's rank, norm, shape or name: Muon and a mask for weight decay on the rank, LAMB
and LARS on the norm, Adafactor on the shape. A scanned stack holds a parameter of all its blocks in one array, whose
rank, norm and shape differ from a block's. So the optimizer gets the tree of the unrolled model; sums over that tree
are then unchanged too. Parameters, gradients and the optimizer state stay stacked. `stacked_program` keeps the compiled
program short.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from sapwood.core.errors import ConfigError
from sapwood.core.unrolled_trees import StackMapping, Stacks, stacks, unrolled_structs
from sapwood.train.optimizers.elementwise import is_elementwise
from sapwood.train.optimizers.stacked_program import run_on_stacks


def blockwise(optimizer: Any, params: Any) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer for stacked parameters: it does to each block what it would do in the unrolled model.

    `Trainer` does this by itself. Use it in a loop of your own over a model with `L.Scan` or `L.Vmap`. The optimizer
    state keeps its structure; leaves that are alike in all blocks of a stack become one stacked leaf. So Adam's state
    is the same as without `blockwise`, and `parallel.opt_shardings` accepts it. Extra arguments of ``update`` may be
    trees of stacked parameters. Functions among them, such as ``value_fn``, take and return stacked parameters.

    Args:
        optimizer: any optax transformation.
        params: the tree of `Param` of ``sw.spec(...).params``, or its trainable part.

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
    return wrap_for_stacks(optimizer, stacks(params))


def wrap_for_stacks(optimizer: Any, stacks: Stacks) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer as `blockwise` does, for stacks that `core.unrolled_trees.stacks` has found.

    Returns the optimizer itself if nothing is stacked, or if it is elementwise.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    if not stacks or is_elementwise(optimizer):
        return optimizer
    blocks = _Blocks(optimizer, stacks)
    return Blockwise(blocks.init, blocks.update)


class Blockwise(optax.GradientTransformationExtraArgs):
    """An optimizer made by `blockwise`. `parallel.opt_shardings` recognizes it by its attribute `blocks`."""

    @property
    def blocks(self) -> tuple[Any, Stacks]:
        """The wrapped optimizer, and the stacks of its parameters."""
        return self.init.__self__.optimizer, self.init.__self__.stacks  # type: ignore[attr-defined]


class _Blocks:
    """The functions `init` and `update` of a `Blockwise` optimizer."""

    def __init__(self, optimizer: Any, stacks: Stacks):
        self.optimizer, self.stacks = optimizer, stacks

    def init(self, params: Any) -> Any:
        return self._run(self.optimizer.init, [self._view(params)], params)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        given = self._view(updates)
        views = [given, self._state_view(state, updates if params is None else params), StackMapping(None, ())]
        if params is not None:
            views[2] = self._view(params)
        views += [given for x in extra.values() if jax.tree.structure(x) == given.stacked]

        beside = {name: x for name, x in extra.items() if jax.tree.structure(x) == given.stacked}
        rest = {name: _between(x, given) if callable(x) else x for name, x in extra.items() if name not in beside}

        def run(updates: Any, state: Any, params: Any, *trees: Any) -> Any:
            return self.optimizer.update(updates, state, params, **rest, **dict(zip(beside, trees, strict=True)))

        return self._run(run, views, updates, state, params, *beside.values())

    def _view(self, params: Any) -> StackMapping:
        return StackMapping(unrolled_structs(params, self.stacks), self.stacks)

    def _state_view(self, state: Any, params: Any) -> StackMapping:
        """Return the `StackMapping` of an optimizer state; `ConfigError` if it does not fit the stacked parameters."""
        view = StackMapping(jax.eval_shape(self.optimizer.init, unrolled_structs(params, self.stacks)), self.stacks)
        given = [np.shape(x) for x in jax.tree.leaves(state)]
        if jax.tree.structure(state) != view.stacked or given != view.shapes:
            raise ConfigError(
                "the optimizer's state does not fit its parameters, which are stacked: the optimizer is given the "
                "blocks of each stack, so its state is made by Trainer.init, or by blockwise(optimizer, params).init"
            )
        return view

    def _run(self, function: Callable[..., Any], views: list[StackMapping], *trees: Any) -> Any:
        """Run a function of unrolled trees on stacked trees; each tree has its `StackMapping`."""
        if all(slot.stack is None for view in views for slot in view.slots):  # no stack among these trees
            return function(*trees)
        if not jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return run_on_stacks(function, views, self.stacks)(*trees)
        # Without jit the function gets concrete arrays, which one can look at.
        result = function(*(view.unfold(tree) for view, tree in zip(views, trees, strict=True)))
        return StackMapping(result, self.stacks).fold(result)


def _between(function: Callable[..., Any], view: StackMapping) -> Callable[..., Any]:
    """Convert a function of stacked trees into one of unrolled trees. Other arguments and results pass unchanged."""

    def run(*args: Any, **options: Any) -> Any:
        result = function(*map(stacked, args), **{name: stacked(x) for name, x in options.items()})
        return unrolled(result)

    def stacked(x: Any) -> Any:
        return view.fold(x) if jax.tree.structure(x) == view.unrolled else x

    def unrolled(x: Any) -> Any:
        return view.unfold(x) if jax.tree.structure(x) == view.stacked else x

    return run

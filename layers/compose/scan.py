"""Scan: one block applied n times in a row, each time with its own variables, traced and compiled once.

It runs as a loop (`sapwood.core.scan`), or as a pipeline on a mesh with the axis "stage" (`scan_pipeline`). The
variables of all blocks are stacked along a leading dimension.
"""

from collections.abc import Callable
from typing import Any

import jax

from sapwood.core.bind import pure
from sapwood.core.errors import ConfigError
from sapwood.core.layer import Layer
from sapwood.core.scan import scan
from sapwood.core.vars import Vars
from sapwood.layers import check_inputs
from sapwood.layers.compose import remat, scan_pipeline
from sapwood.parallel.place_activations import has_mesh

LOOPED = "dots_saveable"
"""Default remat policy of a loop on a CPU: save only the results of matrix products.

The loop writes saved values to a stack and reads them back, which takes longer than computing all but the matrix
products again. With this policy a step of 48 narrow blocks takes 0.95 of the time, and one of the small `gpt` 0.92 of
the time and 0.58 of the memory.
"""


class Scan(Layer):
    """`for i in range(n): x = block(v[i], x, *args)`, compiled once for any n.

    A block returns x with the shapes and dtypes that it takes. Every block gets the same `args`. Each variable has a
    leading dimension of n: `kernel[3]` here is `3/kernel` in the loop above, and both have the same initial values
    (`sw.stack` and `sw.unstack` convert).

    On a mesh with the axis "stage" the stack runs as a pipeline (`Rules.pipeline` has its settings). Each stage has n /
    stages of the blocks. The batch, the first dimension of x, is cut into micro-batches that flow through the stages,
    so a block must treat each example independently. Auxiliary losses are means over the micro-batches. Random keys
    differ between micro-batches.

    Args:
        block: a layer or function of `(v, x, *args)` that returns the next x.
        n: number of blocks, at least 1.
        remat: which values the backward pass recomputes: "full" saves only the inputs of each block; see `Remat` for
            other policies. None saves everything, except in a loop on a CPU without a mesh: there it saves only the
            matrix products, which is faster. "everything_saveable" saves everything there too.
        axis: logical name of the leading dimension of each variable.
        batched: whether a pipeline cuts `args` into micro-batches: True for arrays with a row for each example, such as
            a mask; False for arrays that are the same for all examples, such as positions; a tuple has one bool for
            each argument. None means False, but refuses an argument whose first dimension has the size of the batch.

    Raises:
        ConfigError: n is below 1, the policy is unknown, or `batched` does not fit `args`. In a pipeline: the stages do
            not divide n, or the micro-batches do not divide the batch.
        EffectError: a block of a pipeline puts state, as batch normalization does in training. The statistics of a
            micro-batch are not those of the batch.

    >>> import jax.numpy as jnp
    >>> from sapwood import layers as L
    >>> Scan(L.Dense(1, bias=False), 3)({"kernel": jnp.full((3, 1, 1), 2.0)}, jnp.ones(1))
    Array([8.], dtype=float32)
    """

    block: Callable
    n: int
    remat: str | Callable | None = None
    axis: str | None = "layers"
    batched: bool | tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        check_inputs.positive(self, "n")
        remat.policy(self.remat)
        if not isinstance(self.batched, bool | tuple | None):
            raise ConfigError(f"Scan: batched must be True, False, a tuple of them or None, got {self.batched!r}")

    def __call__(self, v: Vars, x: Any, *args: Any) -> Any:
        batched = self.batched if isinstance(self.batched, tuple) else (self.batched,) * len(args)
        if len(batched) != len(args):
            raise ConfigError(
                f"Scan: batched={self.batched} speaks for {len(batched)} arguments beside x, the call has {len(args)}"
            )
        block = self._again(pure(self.block), self.remat)
        x = v.policy.cast(x)
        if self.axis is not None and scan_pipeline.chosen(v, self.axis):
            x, updates = scan_pipeline.pipelined(v, block, self.n, self.axis, x, args, batched)
        else:
            eager = jax.config.jax_disable_jit  # type: ignore[attr-defined]  # breakpoints must see concrete values
            whole = eager or has_mesh(v) or self.remat is not None  # on a mesh, recomputing would repeat communication
            light = block if whole else self._again(block, LOOPED)

            def body(block: Callable) -> Callable:
                return lambda x, v: block(v, x, *args)

            x, updates = scan(body(block), x, v.stack(self.n, self.axis), self.n, looped=body(light))
        v.merge(updates)
        return x

    def _again(self, block: Callable, saved: str | Callable | None) -> Callable:
        """The block under a remat policy. In a loop XLA merges no recomputation with the forward pass."""
        return block if saved is None else remat.checkpoint(block, saved, prevent_cse=False)

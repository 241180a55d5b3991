"""Scan: one block applied n times in a row, each time with its own variables, traced and compiled once."""

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
from sapwood.parallel.place_activations import meshed

LOOPED = "dots_saveable"
"""What a loop on a CPU keeps for the gradient where nobody says: it writes what it keeps to a stack and reads it back,
which takes longer than to compute anew all but the matrix products. A step of 48 narrow blocks takes 0.95 of the time,
one of the small `gpt` 0.92, with 0.58 of the memory."""


class Scan(Layer):
    """`for i in range(n): x = block(v[i], x, *args)`, compiled once whatever n is.

    The block gives what it takes; `args` go to every copy. Each variable has a leading dimension of n with the logical
    name `axis`: `kernel[3]` here is `3/kernel` there, and both start from the same numbers (`sw.stack` and `sw.unstack`
    convert). `remat` saves memory: "full" keeps the block's inputs alone; see `Remat`. None keeps all for the gradient,
    but in a loop on a CPU without a mesh only the matrix products, which is faster there ("everything_saveable" keeps
    all). Raises `ConfigError` for an n below 1, an unknown policy, or a `batched` that does not fit `args`.

    On a mesh with the axis "stage" the stack is a pipeline (`Rules.pipeline` says how): each stage has n / stages of
    the blocks, and the batch, the first dimension of x, is cut into micro-batches, which flow through, so blocks must
    treat each example by itself. `batched` says which of `args` go with their micro-batch, as a mask with a row for
    each example does, and which are the same for all, as positions are: True or False, or a tuple that speaks for each.
    None takes them for the same for all, and refuses those whose first dimension is of the size of the batch.
    Auxiliary losses are means over the micro-batches; random keys differ between them. Raises `ConfigError` where
    stages do not divide n or micro-batches the batch, `EffectError` for blocks that put state, as batch normalisation
    does in training: the statistics of a micro-batch are not those of the batch.

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

    def __post_init__(self):
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
            eager = jax.config.jax_disable_jit  # type: ignore[attr-defined]  # a breakpoint is to see numbers
            whole = eager or meshed(v) or self.remat is not None  # on a mesh what is computed anew would be sent anew
            light = block if whole else self._again(block, LOOPED)

            def body(block: Callable) -> Callable:
                return lambda x, v: block(v, x, *args)

            x, updates = scan(body(block), x, v.stack(self.n, self.axis), self.n, looped=body(light))
        v.merge(updates)
        return x

    def _again(self, block: Callable, saved: str | Callable | None) -> Callable:
        """The block under a remat policy. Inside a loop nothing can be merged with the forward pass."""
        return block if saved is None else remat.checkpoint(block, saved, prevent_cse=False)

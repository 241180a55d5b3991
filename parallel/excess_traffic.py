"""Whether a compiled training step sends much more than FSDP has to: a parameter gathered twice, its gradient once."""

import math
from collections.abc import Iterable
from typing import Any

from jax.sharding import NamedSharding

from sapwood.parallel.communication import Collectives
from sapwood.parallel.place_activations import split_over

FACTOR = 1.6
"""How much more: XLA:CPU, which adds gradients up whole, sends 1.33 times as much; whole sums in place of all, 2."""


def excess(
    found: Collectives, params: Iterable[Any], batch: NamedSharding, itemsize: int, times: int = 1
) -> str | None:
    """A sentence where a step sends over the axes of FSDP more than `FACTOR` times what it has to, else None.

    `params` are shapes with shardings, `batch` is the sharding of the batch: what is split over axes of both is kept in
    pieces and gathered, forward and backward, `itemsize` bytes an element, and its gradient is scattered, `times` in a
    step (micro-batches). What is sent over other axes or exchanged (`all-to-all`) does not count.
    """
    rows, needed, stored = set(split_over(batch, 0)), 0, set()
    for leaf in params:
        axes = {axis for dim in range(len(leaf.sharding.spec)) for axis in split_over(leaf.sharding, dim)}
        n = math.prod(found.mesh.shape[axis] for axis in axes & rows)
        other = math.prod(found.mesh.shape[axis] for axis in axes - rows)
        stored |= axes & rows
        needed += 3 * times * leaf.size * itemsize // other * (n - 1) // n
    some = [c for c in found if c.axes and set(c.axes) <= stored and "all-to-all" not in c.kind]
    sent = sum(c.sent * c.count for c in some)
    if not needed or sent <= FACTOR * needed:
        return None
    whole = sum(c.sent * c.count for c in some if c.kind == "all-reduce")
    return (
        f"the compiled step sends {sent / 1e9:.3g} GB a device over {' and '.join(map(repr, sorted(stored)))}, where "
        f"gathering parameters and scattering gradients takes {needed / 1e9:.3g} GB; {whole / 1e9:.3g} GB of it "
        "are whole sums (all-reduce). Fewer devices on that axis and the others on 'data' may send less: "
        "sw.parallel.collectives(program) shows what is sent for which layer"
    )

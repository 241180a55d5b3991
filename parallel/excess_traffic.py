"""A warning about compiled training steps that send much more than FSDP needs.

FSDP needs to gather each parameter twice (forward and backward) and to reduce-scatter its gradient once.
`excess_traffic_message` compares these bytes with what the collectives of the compiled step send.
"""

import math
from collections.abc import Iterable
from typing import Any

from jax.sharding import NamedSharding

from sapwood.parallel.communication import Collectives
from sapwood.parallel.place_activations import split_over

FACTOR = 1.6
"""`excess_traffic_message` reports above this ratio of bytes sent to bytes needed.

XLA:CPU sends 1.33 times the bytes, because it all-reduces gradients. A step that all-reduces in place of every gather
and scatter sends 2 times the bytes.
"""


def excess_traffic_message(
    found: Collectives, params: Iterable[Any], batch: NamedSharding, itemsize: int, times: int = 1
) -> str | None:
    """Report a step that sends more than `FACTOR` times the bytes that FSDP needs.

    FSDP axes are the mesh axes that split both the batch and a parameter. Collectives over other axes and all-to-alls
    do not count.

    Args:
        found: the collectives of the compiled step.
        params: the parameters, as shapes with shardings.
        batch: the sharding of the batch.
        itemsize: bytes of one element as it is gathered and scattered.
        times: number of micro-batches in a step; each one gathers and scatters again.

    Returns:
        A sentence for a warning, or None if the step sends no more than that.
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

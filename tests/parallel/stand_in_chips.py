"""Stand-ins for the chips of TPUs, which is all that laying out a mesh looks at."""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class StandIn:
    """All that laying out a mesh looks at in a device."""

    id: int
    slice_index: int | None = None
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "stand-in"


CHIPS = {
    "v5e:4x4": ("TPU v5 lite", (4, 4, 1)),
    "v5p:4x4x4": ("TPU v5", (4, 4, 4)),
    "v6e:8x8": ("TPU v6 lite", (8, 8, 1)),
}
"""Topologies, what a device of theirs is called and where it is: `test_topology` asks libtpu whether that is so."""


def chips(topology, slices):
    """Stand-ins for the devices of so many slices of a topology."""
    kind, (nx, ny, nz) = CHIPS[topology]
    return [
        StandIn(1000 * s + i, s if slices > 1 else None, (x, y, z), platform="tpu", device_kind=kind)
        for s in range(slices)
        for i, (z, y, x) in enumerate(itertools.product(range(nz), range(ny), range(nx)))
    ]

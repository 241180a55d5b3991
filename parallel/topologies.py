"""TPU topologies without TPUs: the devices of a topology, for which any machine can compile.

libtpu (the extra `plan`) makes the devices and compiles for them. It reads the environment variables of `ENVIRONMENT`
when it is loaded, so they must be set when the process starts.
"""

import os
import re
from typing import Any

from sapwood.core.errors import ConfigError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to query
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes may load libtpu, too
}
"""The environment variables that a process needs for `topology`. libtpu reads them when it is loaded."""

# The cloud names accelerator types kind-number. For each kind: libtpu's name of it, and how much a chip adds to the
# number. The number counts TensorCores: two per chip, one per chip for v5e and v6e.
KINDS = {
    "v2": ("v2", 2),
    "v3": ("v3", 2),
    "v4": ("v4", 2),
    "v5litepod": ("v5e", 1),
    "v5e": ("v5e", 1),
    "v5p": ("v5p", 2),
    "v6e": ("v6e", 1),
    "tpu7x": ("tpu7x", 2),
}
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
DEEP = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
        1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16", 6144: "16x16x24"}  # fmt: skip
SHAPES = {"v2": FLAT, "v3": FLAT, "v5e": FLAT, "v6e": FLAT, "v4": DEEP, "v5p": DEEP, "tpu7x": DEEP}
"""The cloud's default shape for each number of chips, by kind."""


def topology(name: str, slices: int = 1) -> list[Any]:
    """The devices of a TPU topology such as "v5e:4x4" (16 chips). The chips need not be present.

    A `sapwood.mesh(..., devices=)` of these devices can be used to lower and compile a program with libtpu's compiler,
    and to read what the program needs; `benchmarks/tpu.py` does so for a whole training step. Arrays cannot be put on
    the devices. Call it in a separate process that is started with the variables of `ENVIRONMENT`; otherwise libtpu
    looks for real chips.

    Args:
        name: a kind and its shape in chips, such as "v5p:4x4x4", or an accelerator type of the cloud, such as
            "v5p-128", which means the cloud's default shape. The number in an accelerator type counts TensorCores, two
            per chip; in "v5litepod-16" (or "v5e-16") and "v6e-16" it counts chips.
        slices: the number of such slices, joined by the network between slices.

    Raises:
        ConfigError: libtpu is not installed; a variable of `ENVIRONMENT` has another value; `slices` is no whole number
            above 0; or there is no such topology.

    >>> topology("v5e:4x4")  # doctest: +SKIP
    [TPU_0(process=0,(0,0,0,0)), TPU_1(process=0,(1,0,0,0)), ...
    >>> len(topology("v5p-128", slices=2))  # doctest: +SKIP
    128
    """
    import importlib.util

    from jax.experimental import topologies

    layout, options = shape_of(name), {}
    if isinstance(slices, bool) or not isinstance(slices, int) or slices < 1:
        raise ConfigError(f"topology {name!r}: slices={slices!r}: a whole number, at least 1, is expected")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError('topology: libtpu is not installed; pip install "sapwood[plan]" brings it (Linux alone)')
    wrong = [f"{key}={value}" for key, value in ENVIRONMENT.items() if os.environ.get(key) != value]
    if wrong:
        raise ConfigError(f"topology: start a process of its own with {' '.join(wrong)} in its environment")
    if slices > 1:
        options["num_slices"] = slices
    if layout.endswith(":1x1"):
        options["chips_per_host_bounds"] = (1, 1, 1)  # libtpu assumes hosts of four chips by default
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=layout, **options).devices)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"topology {name!r}: {reason}; expected kind:shape such as v5e:4x4 or v5p:2x2x4, or an accelerator type "
            "such as v5litepod-16"
        ) from error


def shape_of(name: str) -> str:
    """libtpu's name of a topology, from that name itself or from an accelerator type of the cloud.

    >>> shape_of("v5litepod-16"), shape_of("v5p-128"), shape_of("v6e:8x8")
    ('v5e:4x4', 'v5p:4x4x4', 'v6e:8x8')

    Raises:
        ConfigError: the name is no string, or there is no such accelerator type.
    """
    if not isinstance(name, str):
        raise ConfigError(f'topology: a name such as "v5e:4x4" or "v5litepod-16" is expected, got {name!r}')
    found = re.fullmatch(r"([a-z0-9]+)-([0-9]+)", name.strip(), re.ASCII)
    if found is None:
        return name.strip()
    if found[1] not in KINDS:
        raise ConfigError(
            f"topology {name!r}: no accelerator type is called {found[1]!r}; there are {', '.join(KINDS)}"
        )
    (kind, each), number = KINDS[found[1]], int(found[2])
    shapes = SHAPES[kind]
    if number % each or number // each not in shapes:
        known = ", ".join(str(chips * each) for chips in shapes)
        what = "chips" if each == 1 else "TensorCores (two a chip)"
        raise ConfigError(
            f"topology {name!r}: {number} {what} have no shape of their own, as {known} have; name a shape, such as "
            f"{kind}:{shapes[16]}"
        )
    return f"{kind}:{shapes[number // each]}"

"""TPUs that are not here: the devices of a topology, to compile for on any machine."""

import os
from typing import Any

from sapwood.core.errors import ConfigError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # no machine to ask what it is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may do the same
}
"""What the environment of a process holds in which `topology` works; libtpu reads it when it is loaded."""


def topology(name: str) -> list[Any]:
    """The devices of a TPU topology such as "v5e:4x4" (16 chips), of which none need be here.

    A `sapwood.mesh(..., devices=)` of them serves to lower and compile, with libtpu's own compiler, and to read what
    the program takes: `benchmarks/tpu.py` does it for a whole training step. No array can be put on them. Call it in a
    process of its own, started with `ENVIRONMENT`, since libtpu would look for real chips otherwise.

    Raises:
      ConfigError: libtpu is not installed, the environment is not as it must be, or there is no such topology.

    >>> topology("v5e:4x4")  # doctest: +SKIP
    [TPU_0(process=0,(0,0,0,0)), TPU_1(process=0,(1,0,0,0)), ...
    """
    import importlib.util

    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError('topology: libtpu is not installed; pip install "sapwood[plan]" brings it (Linux alone)')
    wrong = [f"{key}={value}" for key, value in ENVIRONMENT.items() if os.environ.get(key) != value]
    if wrong:
        raise ConfigError(f"topology: start a process of its own with {' '.join(wrong)} in its environment")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"topology {name!r}: {reason}; expected kind:shape such as v5e:4x4 or v5p:2x2x4") from error

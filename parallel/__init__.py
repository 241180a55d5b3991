"""Meshes, logical-axis rules and shardings: one model definition on any number of devices.

`mesh` makes the grid of devices. `Rules` map the logical axis names of a model ("embed", "mlp") to mesh axes.
`param_shardings`, `state_shardings` and `opt_shardings` then give the `NamedSharding` of every leaf, and `init` makes
the arrays. `batch_sharding` and `put_batch` do the same for batches.

>>> import jax, sapwood.parallel as parallel
>>> mesh = parallel.mesh("fsdp=-1")                        # the grid of all devices
>>> spec = {"kernel": jax.ShapeDtypeStruct((128, 512), "float32")}
>>> shardings = parallel.param_shardings(spec, mesh)       # by the default rules, before any array exists
>>> shardings["kernel"].shard_shape((128, 512)) == (128, 512 // len(jax.devices()))
True
"""

from typing import Any

from sapwood.core.moved import find_moved
from sapwood.parallel.batches import batch_sharding, check_batch, check_batch_size, feed, put_batch, shards
from sapwood.parallel.communication import Collective, Collectives, collectives
from sapwood.parallel.meshes import AXES, MeshWarning, mesh
from sapwood.parallel.optimizer_state import opt_shardings
from sapwood.parallel.pipeline.settings import Pipeline
from sapwood.parallel.place_activations import placement
from sapwood.parallel.rule_tables import DEFAULT, TABLES, table
from sapwood.parallel.rules import Rules
from sapwood.parallel.sharded_init import init
from sapwood.parallel.shardings import ShardingWarning, moment_shardings, param_shardings, replicated, state_shardings
from sapwood.parallel.topologies import topology


def __getattr__(name: str) -> Any:
    return find_moved(__name__, name)


__all__ = [
    "AXES",
    "DEFAULT",
    "TABLES",
    "Collective",
    "Collectives",
    "MeshWarning",
    "Pipeline",
    "Rules",
    "ShardingWarning",
    "batch_sharding",
    "check_batch",
    "check_batch_size",
    "collectives",
    "feed",
    "init",
    "mesh",
    "moment_shardings",
    "opt_shardings",
    "param_shardings",
    "placement",
    "put_batch",
    "replicated",
    "shards",
    "state_shardings",
    "table",
    "topology",
]

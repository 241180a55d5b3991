"""Meshes, logical-axis rules and shardings: one model definition on any number of devices.

>>> import jax, sapwood.parallel as parallel
>>> mesh = parallel.mesh("fsdp=-1")                        # the grid of devices
>>> spec = {"kernel": jax.ShapeDtypeStruct((128, 512), "float32")}
>>> shardings = parallel.param_shardings(spec, mesh)       # by the rules, before any array exists
>>> shardings["kernel"].shard_shape((128, 512)) == (128, 512 // len(jax.devices()))
True
"""

from sapwood.parallel.activations import Activation, activations
from sapwood.parallel.batches import batch_sharding, check_batch, check_batch_size, feed, put_batch, shards
from sapwood.parallel.collectives import Collective, Collectives, collectives
from sapwood.parallel.describe import show
from sapwood.parallel.init import init
from sapwood.parallel.mesh import AXES, MeshWarning, mesh
from sapwood.parallel.optimizer import opt_shardings
from sapwood.parallel.place import placement
from sapwood.parallel.rules import DEFAULT, TABLES, Rules, table
from sapwood.parallel.shardings import ShardingWarning, moment_shardings, param_shardings, replicated, state_shardings
from sapwood.parallel.topology import topology

__all__ = [
    "AXES",
    "DEFAULT",
    "TABLES",
    "Activation",
    "Collective",
    "Collectives",
    "MeshWarning",
    "Rules",
    "ShardingWarning",
    "activations",
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
    "show",
    "state_shardings",
    "table",
    "topology",
]

"""`layout`: the layout of a training run on a mesh: parameters, optimizer state, other state, batch and activations.

Shapes and shardings come from the plan of the trainer's state (`sapwood.train.state.plan`), which `fit` uses too.
"""

from collections.abc import Mapping
from typing import Any

import jax

from sapwood.core.errors import ConfigError
from sapwood.core.spec import spec
from sapwood.inspection.layouts import rows, table
from sapwood.inspection.layouts.activations import activations
from sapwood.inspection.layouts.table import Layout
from sapwood.train.config import Config
from sapwood.train.state import plan, trainable


def layout(trainer: Config, batch: Mapping[str, Any]) -> Layout:
    """The layout of all arrays of a trainer that trains on batches of this shape.

    `trainer` is a `Trainer` with a mesh. `batch` is a dict of arrays or `jax.ShapeDtypeStruct` of a global batch.
    Nothing is allocated, and no devices are needed: the mesh may be a `jax.sharding.AbstractMesh`.

    >>> import jax, jax.numpy as jnp, optax
    >>> from jax.sharding import AbstractMesh
    >>> from sapwood import layers as L
    >>> from sapwood.train import Trainer, supervised
    >>> model = lambda v, x: L.Dense(4096)(v.up, x)
    >>> mesh = AbstractMesh((64, 8), ("fsdp", "tensor"))
    >>> trainer = Trainer(supervised(model, inputs="x"), optax.sgd(0.1), mesh=mesh)
    >>> found = layout(trainer, {"x": jnp.ones((64, 1024)), "label": jnp.zeros(64, int)})
    >>> [(row.path, row.nbytes) for row in found.of("parameters")]
    [('up/bias', 16384), ('up/kernel', 262144)]

    Raises:
      ConfigError: the trainer has no mesh, or mesh and rules do not fit together.
    """
    if trainer.mesh is None:
        raise ConfigError("layout: the trainer has no mesh; Trainer(..., mesh=sw.mesh('data=-1')) has one")
    batch = jax.eval_shape(lambda x: x, dict(batch))
    declared = spec(trainer.objective, batch, policy=trainer.policy)
    shapes, where = plan.plan(trainer, batch)[1:]
    assert where is not None
    trained, _ = trainable.split(declared.params, trainer.trainable)
    fed = jax.tree.map(lambda _: trainer.batch_sharding, batch)
    rest = shapes.replace(params=None, opt_state=None, rng=None)
    rest_where = where.replace(params=None, opt_state=None, rng=None)
    found = activations(trainer.objective, batch, policy=trainer.policy)
    return Layout(
        where.step.mesh,
        (
            *table.rows(rows.PARAMETERS, declared.params, where.params),
            *table.rows(rows.OPTIMIZER, shapes.opt_state, where.opt_state, trained),
            *table.rows(rows.STATE, rest, rest_where, trained),
            *table.rows(rows.BATCH, batch, fed),
            *table.activation_rows(found, trainer.mesh, trainer.rules),
        ),
    )

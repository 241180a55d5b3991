"""A step that sends much more than FSDP has to says so."""

import re

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from sapwood.parallel import collectives
from sapwood.parallel.excess_traffic import excess_traffic_message

MESH = AbstractMesh((8, 2), ("fsdp", "tensor"))
OVER = "replica_groups=[2,8]<=[8,2]T(1,0)"  # fsdp


def found(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return collectives(
        f"""HloModule jit_f, num_partitions=16

ENTRY %main (x: f32[512,2048], p: f32[64,2048]) -> f32[512,2048] {{
  %x = f32[512,2048]{{1,0}} parameter(0)
  %p = f32[64,2048]{{1,0}} parameter(1)
{body}
}}""",
        MESH,
    )


GATHER = f"f32[512,2048]{{1,0}} all-gather(%p), {OVER}, dimensions={{0}}"
SCATTER = f"f32[64,2048]{{1,0}} reduce-scatter(%x), {OVER}, dimensions={{0}}, to_apply=%add"
SUM = f"f32[512,2048]{{1,0}} all-reduce(%x), {OVER}, to_apply=%add"
TENSOR = "f32[512,2048]{1,0} all-reduce(%x), replica_groups=[8,2]<=[16], to_apply=%add"
PARAMS = [  # 512 x 2048 on each place of tensor
    jax.ShapeDtypeStruct((512, 4096), "float32", sharding=NamedSharding(MESH, PartitionSpec("fsdp", "tensor"))),
    jax.ShapeDtypeStruct((512,), "float32", sharding=NamedSharding(MESH, PartitionSpec(None))),
]
BATCH = NamedSharding(MESH, PartitionSpec("fsdp"))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([GATHER, GATHER, SCATTER], None),
        ([GATHER, GATHER, SUM], None),  # as on a CPU
        ([GATHER, GATHER, SCATTER, TENSOR, TENSOR, TENSOR], None),
        (
            [SUM, SUM, SUM],
            "sends 0.022 GB a device over 'fsdp', where .* takes 0.011 GB; 0.022 GB of it are whole sums",
        ),
        ([GATHER] * 5, "sends 0.0184 GB .*; 0 GB of it are whole sums"),
    ],
)
def test_what_is_too_much(lines, said):
    got = excess_traffic_message(found(*(f"%y.{i} = {line}" for i, line in enumerate(lines))), PARAMS, BATCH, 4)
    assert (got is None) if said is None else re.search(said, got)


def test_micro_batches_gather_again():
    lines = [f"%y.{i} = {GATHER}" for i in range(6)]
    assert excess_traffic_message(found(*lines), PARAMS, BATCH, 4) is not None
    assert excess_traffic_message(found(*lines), PARAMS, BATCH, 4, times=2) is None

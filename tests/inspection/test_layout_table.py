"""A layout as a table."""

import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from sapwood.core.param import Param
from sapwood.inspection import show
from sapwood.parallel import mesh

SPEC = {
    "embed": {"table": Param((1000, 64), jnp.bfloat16, None, ("vocab", "embed"))},
    "blocks": {"0": {"up": Param((64, 1024), jnp.float32, None, None), "scale": Param((), jnp.float32, None, ())}},
}


def test_rows_say_what_each_device_holds():
    layout = show(SPEC, mesh("fsdp=4,tensor=2"))
    rows = {row.path: row for row in layout.rows}
    assert rows["embed/table"].nbytes == 1000 * 64 * 2 // 8
    assert rows["embed/table"].spec == PartitionSpec("tensor", "fsdp")
    assert rows["blocks/0/up"].nbytes == 64 * 1024 * 4 // 4
    assert rows["blocks/0/scale"].nbytes == 4
    assert layout.nbytes == 16000 + 65536 + 4


def test_the_table_is_one_to_read():
    assert str(show(SPEC, AbstractMesh((4, 2), ("fsdp", "tensor")))).splitlines() == [
        "path            shape      axes           sharding              bytes per device",
        "blocks/0/scale  scalar     scalar         whole                 4 B",
        "blocks/0/up     64 × 1024  -              · × fsdp              64.0 KiB",
        "embed/table     1000 × 64  vocab × embed  tensor × fsdp         15.6 KiB",
        "                                          mesh fsdp=4,tensor=2  79.6 KiB",
    ]

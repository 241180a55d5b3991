"""Collectives read from compiled programs: from written ones, from real ones of eight devices, and those of layouts."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import sapwood as sw
from sapwood.parallel import collectives
from sapwood.parallel.communication import KINDS, axes_of, groups_of, place
from sapwood.parallel.hlo import Instruction, Program


@pytest.fixture(autouse=True)
def _names_of_this_program():
    """A program is taken from the cache whatever its operations are called; here their names are looked at."""
    name = "jax_compilation_cache_include_metadata_in_key"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


MESH = AbstractMesh((4, 2), ("data", "tensor"))


def program(*lines, more="", partitions=8):
    """A program of these lines about an array x of 64 bytes."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"""HloModule jit_f, num_partitions={partitions}
{more}
ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0:T(128)}} parameter(0)
{body}
}}"""


def instruction(attributes, opcode="all-gather"):
    return Instruction("a", "f32[4]", opcode, ("x",), "", attributes, ())


@pytest.mark.parametrize(
    ("attributes", "groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x", ((0, 1), (2, 3), (4, 5), (6, 7)), ("tensor",)),
        ("replica_groups=[4,2]<=[8], x", ((0, 1), (2, 3), (4, 5), (6, 7)), ("tensor",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", ((0, 2, 4, 6), (1, 3, 5, 7)), ("data",)),
        ("replica_groups=[1,8]<=[8]", (tuple(range(8)),), ("data", "tensor")),
        ("replica_groups={}, x", (tuple(range(8)),), ("data", "tensor")),
        ("channel_id=1", (tuple(range(8)),), ("data", "tensor")),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}, x", ((0, 1), (2, 3), (4, 5), (6, 7)), ("tensor",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, x", ((0, 2, 4, 6), (1, 3, 5, 7)), ("data",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", (tuple(range(8)),), ("data", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7)), ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}", ((0, 1), (2, 3), (4, 5), (6, 7)),
         ("tensor",)),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7)), ("tensor",)),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", ((0, 2, 4, 6), (1, 3, 5, 7)), ("data",)),
        ("channel_id=2, source_target_pairs={{0,1},{1,0}}, x", ((0, 1), (1, 0)), ("tensor",)),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", ((0, 2), (2, 4), (4, 6), (6, 0)), ("data",)),
    ],
)  # fmt: skip
def test_the_groups_of_every_notation_and_their_axes(attributes, groups, axes):
    assert groups_of(instruction(attributes + ", use_global_device_ids=true"), 8) == groups
    assert axes_of(groups, MESH) == axes


def test_groups_of_replicas_of_a_program_of_partitions_are_everything():
    one = instruction("channel_id=1, replica_groups={{0}}, to_apply=%add", "all-reduce")
    assert groups_of(one, 8) == (tuple(range(8)),)


@pytest.mark.parametrize(
    ("line", "kind", "size", "nbytes", "sent"),
    [
        ("all-reduce(%x), to_apply=%add", "all-reduce", 4, 64, 96),
        ("all-gather(%x), dimensions={0}", "all-gather", 4, 256, 192),
        ("reduce-scatter(%x), dimensions={0}", "reduce-scatter", 4, 64, 48),
        ("all-to-all(%x), dimensions={0}", "all-to-all", 4, 64, 48),
        ("ragged-all-to-all(%x)", "ragged-all-to-all", 4, 64, 48),
        ("collective-broadcast(%x)", "collective-broadcast", 4, 64, 48),
        ("collective-permute(%x)", "collective-permute", 2, 64, 64),
    ],
)
def test_what_a_device_sends(line, kind, size, nbytes, sent):
    pairs = "source_target_pairs={{0,2},{2,0}}" if "permute" in line else "replica_groups=[2,4]<=[4,2]T(1,0)"
    (found,) = collectives(program(f"ROOT %y = f32[16]{{0}} {line}, {pairs}"), MESH)
    assert (found.kind, found.axes, found.size, found.nbytes, found.sent) == (kind, ("data",), size, nbytes, sent)
    assert (found.count, found.bound, found.asynchronous, found.path) == (1, "=", False, "")


def test_a_start_is_asynchronous_and_its_end_no_other():
    (found,) = collectives(
        program(
            "%s = (f32[16]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[4,2]<=[8], dimensions={0}",
            "ROOT %y = f32[32]{0} all-gather-done(%s)",
        ),
        MESH,
    )
    assert (found.kind, found.asynchronous, found.nbytes) == ("all-gather", True, 128)


def test_one_inside_an_async_start_is_asynchronous():
    inner = (
        "%wrapped (p: f32[16]) -> f32[4] {\n  %p = f32[16]{0} parameter(0)\n"
        "  ROOT %r = f32[4]{0} reduce-scatter(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}\n}\n"
    )
    (found,) = collectives(
        program(
            "%s = ((f32[16]), f32[4], u32[]) async-start(%x), calls=%wrapped",
            "%u = ((f32[16]), f32[4], u32[]) async-update(%s)",
            "ROOT %y = f32[4]{0} async-done(%u)",
            more=inner,
        ),
        MESH,
    )
    assert (found.kind, found.asynchronous, found.axes) == ("reduce-scatter", True, ("data",))


def test_a_tpu_gathers_beside_its_kernels_and_that_is_one_collective():
    """The same channel in the kernel that begins it, in those it runs beside, and in the one that waits for it."""
    inside = "".join(
        f"%fused.{k} (p: f32[16]) -> f32[32] {{\n  %p = f32[16]{{0}} parameter(0)\n  ROOT %g.{k} = f32[32]{{0}} "
        "all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}\n}\n"
        for k in range(3)
    )
    text = program(
        "%async-collective-start = (f32[16], f32[32]) fusion(%x), kind=kCustom, calls=%fused.0",
        "%f = f32[32]{0} fusion(%x), kind=kCustom, calls=%fused.1",
        "ROOT %async-collective-done = f32[32]{0} fusion(%f), kind=kCustom, calls=%fused.2",
        more=inside,
    )
    (found,) = collectives(text, MESH)
    assert (found.kind, found.axes, found.asynchronous, found.count) == ("all-gather", ("tensor",), True, 1)


def test_a_tpu_cuts_out_what_each_keeps_of_a_sum_and_that_is_a_reduce_scatter():
    inside = (
        "%all-reduce-scatter.1 (p: f32[16]) -> f32[4] {\n  %p = f32[16]{0} parameter(0)\n"
        "  %r = f32[16]{0} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true\n"
        "  ROOT %d = f32[4]{0} dynamic-slice(%r)\n}\n"
    )
    text = program("ROOT %y = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1", more=inside)
    (found,) = collectives(text, MESH)
    assert (found.kind, found.nbytes, found.sent) == ("reduce-scatter", 64, 48)


LOOP = """%body (t: (s32[], f32[16])) -> (s32[], f32[16]) {{
  %t = (s32[], f32[16]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %a = f32[16]{{0}} get-tuple-element(%t), index=1
  %one = s32[] constant({step})
  %copied = s32[] copy(%i)
  %next = s32[] add(%copied, %one)
  %r = f32[16]{{0}} all-reduce(%a), channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true, to_apply=%add
  ROOT %out = (s32[], f32[16]) tuple(%next, %r)
}}

%condition (t: (s32[], f32[16])) -> pred[] {{
  %t = (s32[], f32[16]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(7)
  ROOT %c = pred[] compare(%i, %n), direction={direction}
}}
"""
CONFIG = ', backend_config={"known_init_step":{"init":"0","step":"1"},"known_trip_count":{"n":"12"}}'


@pytest.mark.parametrize(
    ("step", "direction", "config", "first", "count", "bound"),
    [
        (1, "LT", CONFIG, "constant(0)", 12, "="),  # as the text says
        (1, "LT", "", "constant(0)", 7, "="),  # as its counter says
        (2, "LT", "", "constant(0)", 4, "="),
        (1, "LT", "", "constant(3)", 4, "="),
        (0, "LT", "", "constant(0)", 1, ">="),
        (1, "NE", "", "constant(0)", 1, ">="),
        (1, "LT", "", "add(%z, %z)", 1, ">="),
    ],
)
def test_in_a_loop_it_counts_for_each_round(step, direction, config, first, count, bound):
    text = program(
        "%z = s32[] constant(0)",
        f"%start = s32[] {first}",
        "%begin = (s32[], f32[16]) tuple(%start, %x)",
        f"%w = (s32[], f32[16]) while(%begin), condition=%condition, body=%body{config}",
        "ROOT %y = f32[16]{0} get-tuple-element(%w), index=1",
        more=LOOP.format(step=step, direction=direction),
    )
    found = collectives(text, MESH)
    assert [(c.count, c.bound) for c in found] == [(count, bound)]
    assert found.sent == count * 64
    assert ("≥" in str(found)) == (bound == ">=")


def test_in_a_branch_it_runs_at_most_once():
    branch = (
        "%b{0} (p: f32[16]) -> f32[16] {{\n  %p = f32[16]{{0}} parameter(0)\n  ROOT %r = f32[16]{{0}} "
        "all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add\n}}\n"
    )
    line = "ROOT %y = f32[16]{0} conditional(%c, %x, %x), branch_computations={%b0, %b1}"
    found = collectives(program(line, more=branch.format(0) + branch.format(1)), MESH)
    assert [(c.count, c.bound) for c in found] == [(1, "<="), (1, "<=")]


def test_groups_of_one_send_nothing():
    text = program("ROOT %y = f32[16]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add")
    assert collectives(text, MESH) == ()


@pytest.mark.parametrize(
    ("op_name", "path", "backward"),
    [
        ("jit(f)/layer/while/body/eval_jaxpr/psum", "layer", False),  # since JAX 0.12
        ("jit(train_step)/jvp(blocks)/while/body/closed_call/attention/query/dot_general", "blocks/attention/query", 0),
        ("jit(train_step)/transpose(jvp(blocks))/while/body/checkpoint/rematted_computation/up/dot_general",
         "blocks/up", 1),
        ("jit(train_step)/(jvp(embed)/reduce_and:jvp(a(b))/reduce)", "embed", 0),
        ("jit(train_step)/optimizer/jit(_where)/select_n", "optimizer", 0),
        ("jit(f)/jvp()/shard_map/psum", "", 0),
        ("", "", 0),
    ],
)  # fmt: skip
def test_the_layer_that_a_collective_serves(op_name, path, backward):
    assert place(op_name) == (path, bool(backward))


def test_what_it_cannot_know_it_asks_for():
    with pytest.raises(sw.ConfigError, match="the program is for 8 devices, mesh data=2 has 2"):
        collectives(program(), AbstractMesh((2,), ("data",)))
    with pytest.raises(sw.ConfigError, match="give the mesh; the program's arguments do not say which it is"):
        collectives(program())


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (lambda f, x: f, "a PjitFunction"),
        (lambda f, x: f.lower(x), "a Lowered"),  # it would say that nothing is sent
        (lambda f, x: f.lower(x).as_text(), "text that is no HLO"),
        (lambda f, x: lambda x: x, "a function"),
    ],
)
def test_a_program_that_is_not_compiled_is_refused(made, what):
    mesh = sw.mesh("data=8")
    f = jax.jit(jax.shard_map(lambda x: lax.psum(x, "data"), mesh=mesh, in_specs=PartitionSpec("data"),
                              out_specs=PartitionSpec()))  # fmt: skip
    with pytest.raises(sw.ConfigError, match=f"expected a compiled program or its HLO text, got {what}; jax.jit"):
        collectives(made(f, jnp.ones(8)), mesh)


def test_a_line_that_is_no_instruction_is_left_alone():
    found = Program("HloModule m\n\nENTRY %main () -> f32[] {\n  %a = strange\n  ROOT %c = f32[] constant(1)\n}\n")
    assert [i.opcode for i in found.computations["main"]] == ["", "constant"]


# ---- programs that XLA made ------------------------------------------------------------------------------------------

REAL = {
    "all-reduce": lambda x: lax.psum(x, "tensor"),
    "all-gather": lambda x: lax.all_gather(x, "tensor", tiled=True),
    "reduce-scatter": lambda x: lax.psum_scatter(x, "tensor", tiled=True),
    "all-to-all": lambda x: lax.all_to_all(x, "tensor", 0, 0, tiled=True),
    "collective-permute": lambda x: lax.ppermute(x, "tensor", [(0, 1), (1, 0)]),
}


@pytest.mark.parametrize("kind", REAL)
def test_each_kind_as_xla_compiles_it(kind):
    mesh = sw.mesh("data=4,tensor=2")
    rows = PartitionSpec(("data", "tensor"))

    def three(x):
        with jax.named_scope("layer"):
            return lax.scan(lambda x, _: (jnp.resize(REAL[kind](x), x.shape) + 1, None), x, None, 3)[0]

    f = jax.jit(jax.shard_map(three, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
    x = jax.ShapeDtypeStruct((32, 5), "float32", sharding=NamedSharding(mesh, rows))
    (found,) = collectives(f.lower(x).compile())
    assert kind in KINDS
    assert found[:4] == (kind, ("tensor",), 2, 160 if kind == "all-gather" else 80)
    assert (found.count, found.bound, found.path) == (3, "=", "layer")


def test_the_table_is_one_to_read():
    text = program(
        "%a = f32[16]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add",
        "%b = f32[16]{0} all-reduce(%a), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add",
        "%s = (f32[16]{0}, f32[16]{0}) all-reduce-start(%b), replica_groups=[4,2]<=[8], to_apply=%add",
        "ROOT %d = f32[16]{0} all-reduce-done(%s)",
    )
    found = collectives(text, MESH)
    assert str(found).splitlines() == [
        "collective  mesh axes             times  asynchronous  bytes sent per device",
        "all-reduce  data                      1             0                     96",
        "all-reduce  tensor                    2             1                    128",
        "            mesh data=4,tensor=2      3                                  224",
    ]
    assert found.kinds == {("all-reduce", ("data",)), ("all-reduce", ("tensor",))}
    assert [c.name for c in found.of("all-reduce", "tensor")] == ["a", "s"]
    assert found.of("all-gather").count == 0
    assert re.match(r"collective +mesh axes", repr(found))

"""The collectives of a compiled program: over which mesh axes each one runs, how many bytes it moves and how often.

`collectives` reads the HLO text with `parallel.hlo` and makes one `Collective` for each operation that runs. HLO names
devices by their position in the mesh. `groups_of` reads the groups of positions, in the three notations that XLA has,
and `axes_of` turns them into mesh axes. On a TPU a collective may be a part of a fused kernel: `collectives` treats
those cases one by one.
"""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from sapwood.core.errors import ConfigError
from sapwood.parallel.hlo import Instruction, Program, Times, nbytes, scopes
from sapwood.parallel.meshes import AnyMesh
from sapwood.parallel.rules import describe

KINDS = (
    "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

Groups = tuple[tuple[int, ...], ...]
"""Groups of devices that exchange data; a device is its position in the mesh, counted from 0 in row-major order."""


class Collective(NamedTuple):
    """One collective operation of a program.

    Attributes:
        kind: one of `KINDS`.
        axes: the mesh axes it runs over: those along which the devices of one group differ.
        size: number of devices in a group; 2 for a permutation.
        nbytes: bytes of the whole array on one device: the operand of an all-reduce, reduce-scatter, all-to-all or
            permutation, the result of an all-gather.
        count: how often it runs in one run of the program.
        bound: how exact `count` is: "=" exact; ">=" at least (inside a loop of unknown length); "<=" at most (inside a
            branch); "~" an estimate (inside both).
        asynchronous: True if it has a separate start and end, with other work between them.
        path: path of the layer that it belongs to, from the program's metadata; "" if the metadata has none.
        backward: True if it is part of a gradient.
        name: name of the instruction in the program.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    nbytes: int
    count: int
    bound: str
    asynchronous: bool
    path: str
    backward: bool
    name: str

    @property
    def sent(self) -> int:
        """Bytes that one device sends in one execution, by the algorithm that sends least (a ring).

        In a group of n devices that is (n - 1) / n of `nbytes`, twice that for an all-reduce, and `nbytes` for a
        permutation.
        """
        n = self.size
        if self.kind == "collective-permute":
            return self.nbytes
        return self.nbytes * (n - 1) * (2 if self.kind == "all-reduce" else 1) // n


class Collectives(tuple[Collective, ...]):
    """The collectives of a program, in program order. Printed, they are a table: a row for each kind and mesh axes."""

    mesh: AnyMesh

    @property
    def kinds(self) -> frozenset[tuple[str, tuple[str, ...]]]:
        """The pairs (kind, mesh axes) that occur."""
        return frozenset((c.kind, c.axes) for c in self)

    def of(self, kind: str, *axes: str) -> "Collectives":
        """The collectives of one kind; with `axes`, only those over exactly these mesh axes."""
        return _made((c for c in self if c.kind == kind and (not axes or set(c.axes) == {*axes})), self.mesh)

    @property
    def count(self) -> int:
        """Number of executions in one run of the program. A loop of unknown length counts as one iteration."""
        return sum(c.count for c in self)

    @property
    def sent(self) -> int:
        """Bytes that one device sends in one run of the program."""
        return sum(c.sent * c.count for c in self)

    def rows(self) -> list[tuple[str, tuple[str, ...], int, str, int, int]]:
        """One tuple for each kind and mesh axes: kind, axes, count, bound, how many are asynchronous, bytes sent."""
        order = {kind: k for k, kind in enumerate(KINDS)}
        found = []
        for kind, axes in sorted(self.kinds, key=lambda sort: (order[sort[0]], sort[1])):
            some = [c for c in self if (c.kind, c.axes) == (kind, axes)]
            times = math.prod((Times(0, c.bound) for c in some), start=Times(1))
            overlapped = sum(c.count for c in some if c.asynchronous)
            found.append((kind, axes, sum(c.count for c in some), times.bound, overlapped,
                          sum(c.sent * c.count for c in some)))  # fmt: skip
        return found

    def __str__(self) -> str:
        head = ("collective", "mesh axes", "times", "asynchronous", "bytes sent per device")
        body = [(kind, "+".join(axes), f"{_SIGNS[bound]}{count}", str(overlapped), f"{sent:,}")
                for kind, axes, count, bound, overlapped, sent in self.rows()]  # fmt: skip
        table = [head, *body, ("", f"mesh {describe(self.mesh)}", f"{self.count}", "", f"{self.sent:,}")]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        pad = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
        return "\n".join("  ".join(p(x, w) for p, x, w in zip(pad, line, widths, strict=True)).rstrip()
                         for line in table)  # fmt: skip

    __repr__ = __str__


_SIGNS = {"=": "", ">=": "≥ ", "<=": "≤ ", "~": "~ "}


def collectives(program: Any, mesh: AnyMesh | None = None) -> Collectives:
    """The collectives by which a compiled program sends data between the devices of a mesh.

    `program` is a `jax.stages.Compiled` or its HLO text. `mesh` is the mesh it was compiled for; None reads it from the
    shardings of the program's arguments and results. A collective in a loop counts once for each iteration. A
    collective whose groups hold one device is left out.

    >>> import jax.numpy as jnp, sapwood.parallel as parallel
    >>> from jax.sharding import PartitionSpec
    >>> mesh = parallel.mesh("data=-1")
    >>> total = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=PartitionSpec("data"),
    ...                       out_specs=PartitionSpec())
    >>> found = collectives(jax.jit(total).lower(jnp.ones(8 * len(jax.devices()))).compile(), mesh)
    >>> {(c.kind, c.axes, c.nbytes) for c in found} <= {("all-reduce", ("data",), 32)}
    True

    Raises:
        ConfigError: the program is not compiled; `mesh` is None and no argument or result has a mesh; or mesh and
            program differ in their number of devices.
    """
    text = program if isinstance(program, str) else getattr(program, "as_text", str)()
    if not text.lstrip().startswith("HloModule"):  # collectives exist only after compilation
        kind = "text that is no HLO" if isinstance(program, str) else f"a {type(program).__name__}"
        raise ConfigError(
            f"collectives: expected a compiled program or its HLO text, got {kind}; "
            "jax.jit(f).lower(*arguments).compile() is one"
        )
    mesh = _mesh(program) if mesh is None else mesh
    count = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    devices = int(count[1]) if count else 1
    if devices not in (1, mesh.size):
        raise ConfigError(f"collectives: the program is for {devices} devices, mesh {describe(mesh)} has {mesh.size}")
    hlo = Program(text)
    found: dict[Any, Collective] = {}
    for number, (instruction, computation, times, around) in enumerate(hlo.running()):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if computation.startswith("all-reduce-scatter"):  # TPU: one kernel sums and cuts out each device's part
            kind = "reduce-scatter"
        key: Any = number
        if around and around[-1].opcode == "fusion":  # TPU: each kernel that runs beside it contains it
            key = (*(outer.name for outer in around[:-1]), kind, *_CHANNEL.findall(instruction.attributes))
        if key in found:
            found[key] = found[key]._replace(asynchronous=True)
            continue
        operands = sum(nbytes(hlo.named[computation, name].type) for name in instruction.operands)
        found[key] = _collective(kind, instruction, operands, times, around, mesh)
    return _made((c for c in found.values() if c.size > 1), mesh)


_CHANNEL = re.compile(r"channel_id=(\d+)")


def _made(found: Iterable[Collective], mesh: AnyMesh) -> Collectives:
    made = Collectives(found)
    made.mesh = mesh
    return made


def _mesh(program: Any) -> AnyMesh:
    given = [] if isinstance(program, str) else jax.tree.leaves((program.input_shardings, program.output_shardings))
    for sharding in given:
        if isinstance(sharding, NamedSharding):
            return sharding.mesh
    raise ConfigError("collectives: give the mesh; the program's arguments do not say which it is")


def _collective(kind: str, instruction: Instruction, operands: int, times: Times, around: Sequence[Instruction],
                mesh: AnyMesh) -> Collective:  # fmt: skip
    groups = groups_of(instruction, mesh.size)
    size = max((len({*group}) for group in groups), default=1)
    whole = operands * size if kind == "all-gather" else operands
    outside = any(outer.opcode == "async-start" or outer.name.startswith("async-") for outer in around)
    names = [i.op_name for i in (instruction, *reversed(around)) if i.op_name]
    path, backward = place(names[0] if names else "")
    return Collective(
        kind, axes_of(groups, mesh), size, whole, times.count, times.bound,
        instruction.opcode.endswith("-start") or outside, path, backward, instruction.name,
    )  # fmt: skip


def groups_of(instruction: Instruction, devices: int) -> Groups:
    """The groups of devices that exchange data; for a permutation, its pairs (source, target).

    XLA has three notations:

    - a list, ``{{0,1},{2,3}}``;
    - ``[2,2]<=[4]`` or ``[2,2]<=[2,2]T(1,0)``: the numbers from 0 as an array of the second shape, transposed by T,
      then reshaped to the first shape, whose rows are the groups;
    - axes of a mesh of XLA's own, ``mesh['axis_0'=2,'axis_1'=2] {'axis_1'}``, whose devices may be in another order.
    """
    text = instruction.attributes
    everything = (tuple(range(devices)),)
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        return _written(pairs[1])
    if named := _NAMED.search(text):
        return _axes_of_a_mesh(*named.groups())
    found = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{(?:\{[\d,]*\},?)*\})", text)
    if found is None or found[1] == "{}":
        return everything
    # With a channel and without global ids, a reduction's groups list replicas. There is one replica, so all devices
    # are one group.
    one_program = "channel_id=" in text
    if one_program and "use_global_device_ids" not in text and instruction.opcode.startswith(_REDUCING):
        return everything
    return _iota(found[1]) if found[1].startswith("[") else _written(found[1])


_REDUCING = ("all-reduce", "all-gather", "reduce-scatter")


def _written(text: str) -> Groups:
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text))


def _iota(text: str) -> Groups:
    shape, source, *order = (tuple(map(int, part.split(","))) for part in re.findall(r"[\[(]([\d,]+)[\])]", text))
    numbers = np.arange(math.prod(source)).reshape(source)
    return tuple(map(tuple, numbers.transpose(*order).reshape(shape).tolist()))


_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")


def _axes_of_a_mesh(mesh: str, devices: str | None, over: str) -> Groups:
    """Groups from the third notation of `groups_of`.

    For example, `mesh` is ``'a'=2,'b'=4``, `devices` is ``[4,2]T(1,0)`` and `over` is ``'a','b':(1)2``. There,
    ``'b':(1)2`` is a sub-axis: b, of size 4, is seen as 1 x 2 x 2, and the groups run over its middle factor.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    numbers = np.arange(math.prod(sizes.values()))
    if devices and (shape := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?", devices)):
        order = tuple(map(int, shape[2].split(","))) if shape[2] else None
        numbers = numbers.reshape(tuple(map(int, shape[1].split(",")))).transpose(order)
    elif devices:
        numbers = np.array([int(number) for number in re.findall(r"\d+", devices)])
    parts = {name: (int(pre or 1), int(size or sizes[name]))
             for name, pre, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", over)}  # fmt: skip
    shape, inside = [], []
    for name, size in sizes.items():
        pre, part = parts.get(name, (size, 1))
        inside.append(len(shape) + 1)
        shape += [pre, part, size // (pre * part)]
    numbers = np.moveaxis(numbers.reshape(shape), inside, range(-len(inside), 0))
    return tuple(map(tuple, numbers.reshape(-1, math.prod(part for _, part in parts.values())).tolist()))


def axes_of(groups: Groups, mesh: AnyMesh) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ, in the mesh's order."""
    sizes = tuple(mesh.shape.values())
    places = [np.stack(np.unravel_index(group, sizes), 1) for group in groups if group]
    differ = [(place != place[:1]).any(0) for place in places]
    return tuple(itertools.compress(mesh.axis_names, np.any(differ, 0) if differ else ()))


# Scopes that JAX's transforms add to the name of an operation. They are no layers.
_TRANSFORMS = {
    "while", "body", "cond", "closed_call", "eval_jaxpr", "checkpoint", "rematted_computation", "shard_map", "branch",
    "remat", "core_call", "pjit", "custom_jvp_call", "custom_vjp_call", "scan",
}  # fmt: skip


def place(op_name: str) -> tuple[str, bool]:
    """The layer path in an operation's metadata name, and whether the operation is part of a gradient.

    >>> place("jit(train_step)/transpose(jvp(blocks))/while/body/closed_call/attention/out/dot_general")
    ('blocks/attention/out', True)
    >>> place("jit(train_step)/optimizer/add")
    ('optimizer', False)
    """
    name = _first(op_name.partition(";")[0])
    found = [scope for scope in scopes(name) if scope not in _TRANSFORMS][:-1]
    return "/".join(scope for scope in found if not scope.startswith("branch_")), "transpose(" in name


def _first(op_name: str) -> str:
    """The name of the first of several merged operations: ``jit(f)/(a/add:b/add)`` gives ``jit(f)/a/add``."""
    before, several, after = op_name.partition("/(")
    if not several:
        return op_name
    depth = 0
    for at, letter in enumerate(after):
        depth += (letter == "(") - (letter == ")")
        if depth < 0 or (letter == ":" and not depth):
            return _first(f"{before}/{after[:at]}")
    return f"{before}/{after}"

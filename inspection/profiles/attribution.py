"""The layer that each operation of a compiled program belongs to, from the metadata in its HLO text.

Every layer call runs under `jax.named_scope` with its path, so an instruction's ``op_name`` reads
``jit(train_step)/transpose(jvp(blocks))/while/body/attention/dot_general``: the path between the names of JAX's own
transforms and loops. A fused operation does the work of several instructions but is attributed to one layer: that of
its matrix product or convolution, else that of its result. `Place.mixed` is True if it does work of several layers. An
operation without a name is attributed to its readers (`_served`), else to the loop around it (`_around`).
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from sapwood.core.paths import Path
from sapwood.parallel import hlo
from sapwood.parallel.hlo import Instruction

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"

OBJECTIVE = "(outside layers)"
OPTIMIZER = "(optimizer)"
UNKNOWN = "(not attributed)"


@dataclass(frozen=True)
class Place:
    """The layer, the direction and the kind that the time of an operation is attributed to.

    Attributes:
        path: a layer path, or one name in parentheses such as `OPTIMIZER`.
        direction: `FORWARD`, `BACKWARD`, `UPDATE`, or empty if unknown.
        kind: the kind of operation: "matmul", "reduction", "elementwise", ...
        mixed: True for a fused operation that does work of several layers.
        container: True for a loop or a branch. Operations inside it have the time; it counts only while none of them
            runs.
    """

    path: Path
    direction: str
    kind: str
    mixed: bool = False
    container: bool = False


_CONTAINERS = ("while", "call", "conditional", "async-start", "async-done")

_KINDS = (  # kind, opcodes, words in custom-call targets; the first match counts, the heaviest first
    ("convolution", ("convolution",), ("conv",)),
    ("matmul", ("dot", "ragged-dot"), ("gemm", "matmul", "dot", "cublas")),
    ("communication", ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute",
                       "collective-broadcast", "send", "recv"), ()),
    ("sort", ("sort",), ("topk", "sort")),
    ("reduction", ("reduce", "reduce-window", "select-and-scatter"), ()),
    ("indexing", ("scatter", "gather", "dynamic-slice", "dynamic-update-slice"), ()),
)  # fmt: skip
_MOVES = {
    "parameter", "constant", "iota", "broadcast", "bitcast", "bitcast-convert", "convert", "copy", "copy-start",
    "copy-done", "reshape", "transpose", "reverse", "slice", "concatenate", "pad", "tuple", "get-tuple-element",
}  # fmt: skip


class Program:
    """A compiled program and the `Place` of each of its operations.

    ``text`` is the HLO text. ``layers`` are the paths of the model's layer calls; other scopes in a name are no layers.

    >>> text = '''HloModule jit_step
    ... ENTRY %main (x: f32[2,2]) -> f32[2,2] {
    ...   %x = f32[2,2]{1,0} parameter(0)
    ...   ROOT %d = f32[2,2]{1,0} dot(%x, %x), metadata={op_name="jit(step)/transpose(jvp(a/b))/dot_general"}
    ... }'''
    >>> Program(text, [("a", "b")]).place("d")
    Place(path=('a', 'b'), direction='backward', kind='matmul', mixed=False, container=False)
    """

    def __init__(self, text: str, layers: Iterable[Path]):
        self.name = text.partition(",")[0].split()[1]
        self.layers = {path[:k] for path in layers for k in range(1, len(path) + 1)}
        self.bodies = hlo.Program(text).computations
        self.instructions: dict[str, Instruction] = {}
        self.homes: dict[str, str] = {}  # instruction -> its computation
        self.callers: dict[str, Instruction] = {}
        self.users: dict[str, list[Instruction]] = {}
        for computation, instructions in self.bodies.items():
            for instruction in instructions:
                self.instructions[instruction.name] = instruction
                self.homes[instruction.name] = computation
                for _, body in instruction.calls:
                    self.callers.setdefault(body, instruction)
                for operand in instruction.operands:
                    self.users.setdefault(operand, []).append(instruction)
        self._places: dict[str, Place] = {}

    def place(self, name: str) -> Place:
        """The place of an operation of the program. The path is `UNKNOWN` if the metadata names no part of it."""
        if name not in self._places:
            self._places[name] = self._find(name)
        return self._places[name]

    def _find(self, name: str) -> Place:
        instruction = self.instructions.get(name)
        if instruction is None:
            return Place((UNKNOWN,), "", "other")
        parts = [instruction] if instruction.opcode in _CONTAINERS else list(self._inside(instruction))
        heavy = max(parts, key=_weight)
        candidates = [heavy] if _weight(heavy) >= _HEAVY else []
        named = (self.label(part.op_name) for part in (*candidates, instruction, *reversed(parts)))
        path, direction = next(filter(None, named), None) or self._served(instruction) or self._around(instruction)
        own = (self.label(part.op_name) for part in parts if part.opcode not in _MOVES)
        others = {label[0] for label in own if label is not None}
        container = instruction.opcode in _CONTAINERS
        return Place(path, direction, _kind(heavy), len(others) > 1, container)

    def _inside(self, instruction: Instruction) -> Iterable[Instruction]:
        """The instructions in a fused instruction; any other instruction itself."""
        bodies = instruction.calls if instruction.opcode == "fusion" else ()
        if not bodies:
            yield instruction
        for _, body in bodies:
            for part in self.bodies.get(body, ()):
                yield from self._inside(part)

    def _served(self, instruction: Instruction) -> tuple[Path, str] | None:
        """Path and direction of a nameless operation, from its readers; None if they differ or there are none.

        A copy that the compiler added belongs to its reader. An operation that computes and is read by the optimizer is
        a gradient. It belongs to the layer of the parameter that the optimizer reads with it.
        """
        computes = any(part.opcode not in _MOVES for part in self._inside(instruction))
        found, waiting, seen = set(), [instruction], {instruction.name}
        while waiting:
            for user in self.users.get(waiting.pop().name, ()):
                parts = list(self._inside(user))
                label = next(filter(None, (self.label(part.op_name) for part in (user, *reversed(parts)))), None)
                if label is not None and label[1] == UPDATE and computes:
                    found |= {(path, BACKWARD) for path in map(self._owner, user.operands) if path}
                elif label is not None:
                    found.add(label)
                elif user.name not in seen and all(part.opcode in _MOVES for part in parts):
                    seen.add(user.name)
                    waiting.append(user)
        return found.pop() if len(found) == 1 else None

    def _owner(self, operand: str) -> Path:
        """The layer of a program input that is a model parameter or its optimizer state; () for other inputs."""
        op_name = self.instructions[operand].op_name if operand in self.instructions else ""
        names = tuple(re.findall(r"\['([^']*)'\]", op_name.replace("\\", "")))
        return max((names[:k] for k in range(len(names) + 1) if names[:k] in self.layers), key=len, default=())

    def _around(self, instruction: Instruction) -> tuple[Path, str]:
        """Path and direction of the loop or branch that a nameless operation is in."""
        caller = self.callers.get(self.homes[instruction.name])
        if caller is None:
            return (UNKNOWN,), ""
        return self.label(caller.op_name) or self._around(caller)

    def label(self, op_name: str) -> tuple[Path, str] | None:
        """Path and direction in an ``op_name``; None for a name without scopes."""
        name = op_name.partition(";")[0]
        if "/" not in name or name.startswith("args["):
            return None
        scopes = hlo.scopes(name)[:-1]
        scopes = [s for k, s in enumerate(scopes) if s != "while" and scopes[max(k - 1, 0)] != "while"]
        if scopes[:1] == ["optimizer"] and "jvp(" not in name.partition("optimizer")[0]:
            return (OPTIMIZER,), UPDATE
        path: Path = ()
        for scope in scopes:
            if (*path, scope) in self.layers:
                path = (*path, scope)
        return path or (OBJECTIVE,), BACKWARD if "transpose(" in name else FORWARD


_HEAVY = len(_KINDS) + 1  # a part of at least this weight decides the place of a fused operation


@functools.cache
def _opcode_weights() -> dict[str, int]:
    return {code: len(_KINDS) + 2 - k for k, (_, codes, _) in enumerate(_KINDS) for code in codes}


def _weight(part: Instruction) -> int:
    if part.opcode == "custom-call":
        return len(_KINDS) + 2
    if part.opcode in _MOVES:
        return 0
    return _opcode_weights().get(part.opcode.removesuffix("-start").removesuffix("-done"), 1)


def _kind(part: Instruction) -> str:
    code = part.opcode.removesuffix("-start").removesuffix("-done")
    target = part.target
    for kind, codes, targets in _KINDS:
        if code in codes or any(word in target.lower() for word in targets if target):
            return kind
    if part.opcode in _CONTAINERS:
        return "loop"
    return target or ("copy" if code in _MOVES else "elementwise")

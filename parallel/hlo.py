"""A parser for the text of a compiled program (HLO): its computations, their calls, and how often each one runs.

`Program` reads the text line by line with regular expressions and skips lines that match none of them. The opcode of an
instruction that it cannot read is "". `parallel.communication` and `inspection.profiles` read programs through it.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_JITTED = re.compile(r"\bp?jit\([^()]*\)")
_WRAPPER = re.compile(r"\b\w+\(|\)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|token|[a-z]+[0-9]+\w*)\[([0-9,<=]*)\]")
_BITS = re.compile(r"[a-z]+(\d+)")


@dataclass(frozen=True)
class Instruction:
    """One instruction, the line ``%name = type opcode(operands), attributes``.

    Attributes:
        name: its name, unique within its computation.
        type: the type of its result, such as ``f32[2,4]{1,0}``; see `nbytes`.
        opcode: such as "all-reduce"; "" if the line cannot be read.
        operands: the names of its operands, which are instructions of the same computation.
        literal: the value of a constant, as text; "" for other opcodes.
        attributes: the text after the operands, metadata included.
        calls: pairs (attribute, name of the called computation), such as ``("body", "loop_body")``.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    calls: tuple[tuple[str, str], ...]

    @property
    def op_name(self) -> str:
        """The name of the traced operation that it comes from, with its scopes; "" if the metadata has none."""
        found = _OP_NAME.search(self.attributes)
        return _unescaped(found[1]) if found else ""

    @property
    def target(self) -> str:
        """The function that a custom call calls; "" for other opcodes."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str:
        """The computation that it calls by an attribute such as ``body``; "" if there is none."""
        return dict(self.calls).get(attribute, "")


class Times(NamedTuple):
    """How often something runs. The product of two is how often an inner part runs.

    `bound` says how exact `count` is: "=" exact; ">=" at least (a loop of unknown length); "<=" at most (a branch);
    "~" an estimate (both).
    """

    count: int
    bound: str = "="

    def __mul__(self, other: "Times") -> "Times":  # type: ignore[override]
        bounds = {self.bound, other.bound} - {"="}
        return Times(self.count * other.count, bounds.pop() if len(bounds) == 1 else "~" if bounds else "=")


class Program:
    """A parsed program: `computations`, lists of instructions by name, and `entry`, the name of the first one to run.

    >>> text = '''HloModule jit_f
    ... ENTRY %main (x: f32[4]) -> f32[4] {
    ...   %x = f32[4]{0} parameter(0)
    ...   ROOT %y = f32[4]{0} negate(%x), metadata={op_name="jit(f)/neg"}
    ... }'''
    >>> program = Program(text)
    >>> program.entry, [i.opcode for i in program.computations["main"]], nbytes("f32[4]{0}")
    ('main', ['parameter', 'negate'], 16)
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        for line in text.splitlines():
            if head := _HEAD.match(line):
                here = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
            elif (found := _LINE.match(line)) and self.computations:
                here.append(_instruction(found[1], found[2]))

    def running(self) -> Iterator[tuple[Instruction, str, Times, tuple[Instruction, ...]]]:
        """Yield each instruction that runs, with three facts about it.

        These are the name of its computation, how often it runs in one run of the program, and the instructions that
        call it, the outermost first.
        """
        yield from self._running(self.entry, Times(1), ())

    def _running(self, name: str, times: Times, around: tuple) -> Iterator[tuple]:
        for instruction in self.computations.get(name, ()):
            yield instruction, name, times, around
            for _, called in instruction.calls:
                yield from self._running(called, times * self._often(name, instruction), (*around, instruction))

    def _often(self, computation: str, instruction: Instruction) -> Times:
        if instruction.opcode == "while":
            trips = self.trips(computation, instruction)
            return Times(1, ">=") if trips is None else Times(trips)
        return Times(1, "<=") if instruction.opcode == "conditional" else Times(1)

    @functools.cached_property
    def named(self) -> dict[tuple[str, str], Instruction]:
        """The instructions by (computation, name)."""
        return {(name, i.name): i for name, found in self.computations.items() for i in found}

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """The number of iterations of a `while`; None if it cannot be found.

        It is XLA's ``known_trip_count``, or follows from the loop's counter: an integer that starts at a constant,
        grows by a constant in each iteration, and is compared with a constant by "less than".
        """
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        body, condition = loop.called("body"), loop.called("condition")
        until = self._last(condition)
        if until is None or until.opcode != "compare" or "direction=LT" not in until.attributes:
            return None
        begin, after = self._seen(computation, loop.operands[0]), self._last(body)
        place = self._place(condition, until.operands[0])
        end = self._constant(condition, until.operands[1], begin, computation)
        if place is None or end is None or begin is None or after is None or {begin.opcode, after.opcode} != {"tuple"}:
            return None
        if place >= min(len(begin.operands), len(after.operands)):
            return None
        first, add = self._constant(computation, begin.operands[place]), self._seen(body, after.operands[place])
        if first is None or add is None or add.opcode != "add" or self._place(body, add.operands[0]) != place:
            return None
        step = self._constant(body, add.operands[1], begin, computation)
        return None if not step or step < 0 else max(0, -(-(end - first) // step))

    def _last(self, computation: str) -> Instruction | None:
        found = self.computations.get(computation)
        return found[-1] if found else None

    def _seen(self, computation: str, name: str) -> Instruction | None:
        """The instruction with this name. Copies, bitcasts and conversions are followed to their operand."""
        found = self.named.get((computation, name))
        while found is not None and found.opcode in ("copy", "bitcast", "convert"):
            found = self.named.get((computation, found.operands[0]))
        return found

    def _place(self, computation: str, name: str) -> int | None:
        """The index of a value in the tuple that a loop carries; None if it is no entry of that tuple."""
        found = self._seen(computation, name)
        if found is None or found.opcode != "get-tuple-element":
            return None
        of = self._seen(computation, found.operands[0])
        return int(found.attributes.partition("index=")[2].split(",")[0]) if of and of.opcode == "parameter" else None

    def _constant(self, computation: str, name: str, begin: Instruction | None = None, outer: str = "") -> int | None:
        """The integer value of a constant in this computation, or of one that the loop's first tuple holds.

        `begin` is the instruction that makes the first tuple, and `outer` is its computation. None if there is no
        constant integer.
        """
        found = self._seen(computation, name)
        if found is not None and found.opcode == "constant":
            return int(found.literal) if re.fullmatch(r"-?\d+", found.literal) else None
        place = self._place(computation, name)
        if place is None or begin is None or place >= len(begin.operands):
            return None
        return self._constant(outer, begin.operands[place])


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return Instruction(name, rest, "", (), "", "", ())
    close = _closing(rest, opcode.end() - 1)
    attributes = rest[close + 1 :]
    plain = attributes.partition("metadata=")[0] + attributes.partition("backend_config=")[2]
    calls = tuple(
        (attribute, called.strip().lstrip("%"))
        for attribute, several, one in _CALLS.findall(plain)
        for called in (several.split(",") if several else [one])
    )
    inside = rest[opcode.end() : close]
    literal = inside if opcode[1] == "constant" else ""
    return Instruction(name, rest[:end], opcode[1], tuple(_NAME.findall(inside)), literal, attributes, calls)


def _unescaped(text: str) -> str:
    """Undo XLA's escapes in a quoted string: a backslash before quotes and backslashes, octal bytes for non-ASCII."""
    if "\\" not in text:
        return text
    plain = lambda found: bytes([int(found[1], 8)]) if found[1].isdigit() else found[1]  # noqa: E731
    return re.sub(rb"\\([0-7]{3}|.)", plain, text.encode()).decode(errors="replace")


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`; the length of the text if none does."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    return len(text)


def scopes(op_name: str) -> list[str]:
    """The scopes in an operation's name, then the operation itself, without JAX's transforms around them.

    >>> scopes("jit(step)/transpose(jvp(blocks))/while/body/out/dot_general")
    ['blocks', 'while', 'body', 'out', 'dot_general']
    """
    return [scope for scope in _WRAPPER.sub("", _JITTED.sub("", op_name)).split("/") if scope]


def nbytes(kind: str) -> int:
    """Bytes of an HLO type: ``f32[2,4]{1,0}`` has 32. The bytes of a tuple are the sum over its parts.

    >>> nbytes("(f32[2,4]{1,0:T(8,128)}, pred[3], s32[])"), nbytes("bf16[8]"), nbytes("u4[8]")
    (39, 16, 4)
    """
    total = 0
    for name, shape in _ARRAY.findall(kind):
        bits = 8 if name == "pred" else int(found[1]) if (found := _BITS.match(name)) else 0
        sizes = [int(size.lstrip("<=")) for size in shape.split(",") if size]
        total += (math.prod(sizes) * bits + 7) // 8
    return total

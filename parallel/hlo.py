"""The text of a compiled program (HLO): its computations, what calls what, and how often each runs."""

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
    """One line: ``%name = type opcode(operands), attributes``; what it calls, and by which attribute."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str  # of a constant
    attributes: str
    calls: tuple[tuple[str, str], ...]

    @property
    def op_name(self) -> str:
        """Where in the traced program it comes from; empty where the text does not say."""
        found = _OP_NAME.search(self.attributes)
        return _unescaped(found[1]) if found else ""

    @property
    def target(self) -> str:
        """What a custom call calls; empty for others."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str:
        """What it calls by an attribute such as ``body``; empty where it calls nothing by it."""
        return dict(self.calls).get(attribute, "")


class Times(NamedTuple):
    """How often something runs: `count`, or at least that often (a loop of unknown length), or at most (a branch)."""

    count: int
    bound: str = "="

    def __mul__(self, other: "Times") -> "Times":  # type: ignore[override]
        bounds = {self.bound, other.bound} - {"="}
        return Times(self.count * other.count, bounds.pop() if len(bounds) == 1 else "~" if bounds else "=")


class Program:
    """A program's computations by name, each a list of instructions, and the name of the one it begins with.

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
        """Each instruction that runs, its computation, how often in one run, and the callers around it."""
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
        """Each instruction by computation and name."""
        return {(name, i.name): i for name, found in self.computations.items() for i in found}

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """How often a `while` goes round: as the text says, or as its counter does; None where neither tells.

        A counter is a number that begins with a constant, grows by one in each round and is compared with another.
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
        """The instruction of a name, or what it is a copy of."""
        found = self.named.get((computation, name))
        while found is not None and found.opcode in ("copy", "bitcast", "convert"):
            found = self.named.get((computation, found.operands[0]))
        return found

    def _place(self, computation: str, name: str) -> int | None:
        """Which entry of its loop's tuple a value is."""
        found = self._seen(computation, name)
        if found is None or found.opcode != "get-tuple-element":
            return None
        of = self._seen(computation, found.operands[0])
        return int(found.attributes.partition("index=")[2].split(",")[0]) if of and of.opcode == "parameter" else None

    def _constant(self, computation: str, name: str, begin: Instruction | None = None, outer: str = "") -> int | None:
        """An integer that is a constant here, or one that came into the loop with its first tuple."""
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
    """A quoted text as it was: XLA writes quotes and backslashes with a backslash, other than ASCII in octal bytes."""
    if "\\" not in text:
        return text
    plain = lambda found: bytes([int(found[1], 8)]) if found[1].isdigit() else found[1]  # noqa: E731
    return re.sub(rb"\\([0-7]{3}|.)", plain, text.encode()).decode(errors="replace")


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    return len(text)


def scopes(op_name: str) -> list[str]:
    """The scopes in an operation's name and last its own, JAX's transforms around them taken off.

    >>> scopes("jit(step)/transpose(jvp(blocks))/while/body/out/dot_general")
    ['blocks', 'while', 'body', 'out', 'dot_general']
    """
    return [scope for scope in _WRAPPER.sub("", _JITTED.sub("", op_name)).split("/") if scope]


def nbytes(kind: str) -> int:
    """Bytes of a type, of a tuple those of its parts: ``f32[2,4]{1,0}`` are 32.

    >>> nbytes("(f32[2,4]{1,0:T(8,128)}, pred[3], s32[])"), nbytes("bf16[8]"), nbytes("u4[8]")
    (39, 16, 4)
    """
    total = 0
    for name, shape in _ARRAY.findall(kind):
        bits = 8 if name == "pred" else int(found[1]) if (found := _BITS.match(name)) else 0
        sizes = [int(size.lstrip("<=")) for size in shape.split(",") if size]
        total += (math.prod(sizes) * bits + 7) // 8
    return total

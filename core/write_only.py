"""`fills_how`: find out from bytecode whether code only fills a container, such as a log, and never reads it.

`fingerprint` uses it: the contents of such a container do not influence what the code computes.
"""

import dis

METHODS = ("append", "appendleft", "extend", "extendleft", "insert", "add", "update")
ITEM = "[]="  # the code sets an item
_OF_ITEMS = ("append", "extend")  # methods on an item; no `update`, which an optimizer among the items has, too
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")


def fills_how(steps: list[dis.Instruction]) -> str | None:
    """How code fills the container that was just pushed on the stack: a method's name, or ``"[]="``; else None.

    ``log.append(x)``, ``log["loss"] = x``, ``log["n"] += 1``, ``log["loss"].append(x)`` and
    ``log.setdefault("loss", []).append(x)`` fill it. None if the code does, or may do, anything else with it. The
    function follows the height of the stack above the container, and returns None at a jump.

    >>> def note(x):
    ...     log["loss"] = x
    >>> steps = [step for step in dis.get_instructions(note) if step.opname != "CACHE"]
    >>> loaded = [step.argval for step in steps].index("log")
    >>> fills_how(steps[loaded + 1 :])
    '[]='
    """
    height, item, called = 1, False, False
    for at, step in enumerate(steps):
        effect = dis.stack_effect(step.opcode, step.arg, jump=False)
        if height == 1 and step.opname in _ATTRIBUTES:
            if step.argval in (_OF_ITEMS if item else METHODS):
                return step.argval
            if step.argval != "setdefault" or item:
                return None
            called = True
        elif height == 1 and item and called and step.opname == "POP_TOP":  # a `setdefault` whose result is dropped
            return ITEM
        elif height == 1 and not (effect > 0 and step.opname.startswith(("LOAD_", "BUILD_", "PUSH_"))):
            return None
        elif height == 2 and (step.opname == "STORE_SUBSCR" or _adds(steps[at:])):
            return ITEM
        elif step.opcode in (*dis.hasjrel, *dis.hasjabs) or (
            step.opname in ("COPY", "SWAP") and (step.arg or 0) >= height
        ):
            return None
        height += effect
        if height < 1:
            return None
        if height == 1 and effect < 0:  # the container was consumed; its item or result is on top
            if not (_subscript(step) or (called and not item and step.opname == "CALL")):
                return None
            item = True
    return None


def _subscript(step: dis.Instruction) -> bool:
    return step.opname == "BINARY_SUBSCR" or (step.opname, step.argrepr) == ("BINARY_OP", "[]")


def _adds(steps: list[dis.Instruction]) -> bool:
    """True if the steps begin ``log[key] += x``, with container and key on top of the stack."""
    names = [(step.opname, step.arg) for step in steps[:2]]
    return names == [("COPY", 2)] * 2 and _subscript(steps[2])

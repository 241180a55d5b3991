"""`filled`: whether code only puts something into a container, such as a log, and takes nothing out of it."""

import dis

METHODS = ("append", "appendleft", "extend", "extendleft", "insert", "add", "update")
ITEM = "[]="  # an item is set
_OF_ITEMS = ("append", "extend")  # which only containers have: an optimiser among the items has an `update`, too
_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")


def filled(steps: list[dis.Instruction]) -> str | None:
    """By what a container is filled that lies on the stack before these steps: a method's name, or ``"[]="``.

    ``log.append(x)``, ``log["loss"] = x``, ``log["n"] += 1``, ``log["loss"].append(x)`` and
    ``log.setdefault("loss", []).append(x)`` fill it. None where anything else is done with it, or may be: the height
    of the stack above it is followed, and no jumps are.

    >>> def note(x):
    ...     log["loss"] = x
    >>> steps = [step for step in dis.get_instructions(note) if step.opname != "CACHE"]
    >>> loaded = [step.argval for step in steps].index("log")
    >>> filled(steps[loaded + 1 :])
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
        elif height == 1 and item and called and step.opname == "POP_TOP":  # setdefault, for itself
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
        if height == 1 and effect < 0:  # what was made of it is on top now
            if not (_subscript(step) or (called and not item and step.opname == "CALL")):
                return None
            item = True
    return None


def _subscript(step: dis.Instruction) -> bool:
    return step.opname == "BINARY_SUBSCR" or (step.opname, step.argrepr) == ("BINARY_OP", "[]")


def _adds(steps: list[dis.Instruction]) -> bool:
    """Whether a container and a key, on top, are those of ``log[key] += x``."""
    names = [(step.opname, step.arg) for step in steps[:2]]
    return names == [("COPY", 2)] * 2 and _subscript(steps[2])

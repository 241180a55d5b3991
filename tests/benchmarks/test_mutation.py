"""Small faults are made in a syntax tree, one at a time, and reported where they are reached."""

import ast
import builtins
import dataclasses

import pytest

from benchmarks.mutation import mutate

SOURCE = '''
LIMIT = 3 + 4  # outside of functions nothing is touched

def f(x, items=()):
    """Text with a + b stays."""
    if x > 2 and not items:
        items += (x,)
        print("seen")
    else:
        raise ValueError(1 + x)
    return x - 1 if items else "a" + "b"
'''


def faults():
    return {(site.kind, site.before): site for site in mutate.sites("core/x.py", SOURCE)}


def test_the_faults_of_a_function():
    assert {(kind, before, site.after) for (kind, before), site in faults().items()} == {
        ("condition", "if x > 2 and (not items):", "if not (x > 2 and (not items)):"),
        ("boolean", "x > 2 and (not items)", "x > 2 or not items"),
        ("comparison", "x > 2", "x >= 2"),
        ("constant", "2", "3"),
        ("sign", "not items", "items"),
        ("statement", "items += (x,)", "pass"),
        ("statement", "print('seen')", "pass"),
        ("condition", "x - 1 if items else 'a' + 'b'", "x - 1 if not items else 'a' + 'b'"),
        ("arithmetic", "x - 1", "x + 1"),
        ("constant", "1", "2"),
    }


def test_one_fault_is_made_and_no_other():
    for site in faults().values():
        text = ast.unparse(mutate.mutated(SOURCE, site))
        plain = ast.unparse(ast.parse(SOURCE))
        changed = [(a, b) for a, b in zip(plain.splitlines(), text.splitlines(), strict=True) if a != b]
        assert len(changed) == 1, site
    names: dict = {}
    exec(compile(mutate.mutated(SOURCE, faults()["arithmetic", "x - 1"]), "x", "exec"), names)
    assert names["f"](5) == 6


def test_a_fault_moves_with_its_line_and_is_missed_where_it_is_gone():
    site = faults()["arithmetic", "x - 1"]
    moved = SOURCE.replace("def f", "def g(x):\n    return x - 1\n\n\ndef f")
    assert ast.unparse(mutate.mutated(moved, dataclasses.replace(site, line=site.line + 4))).count("x + 1") == 1
    with pytest.raises(LookupError, match="draw the faults anew"):
        mutate.mutated(SOURCE.replace("x - 1", "x - 3"), site)


def test_a_line_that_is_reached_says_so(monkeypatch):
    listed = dict(enumerate(faults().values()))
    reached: list[int] = []
    monkeypatch.setattr(builtins, "__reached__", reached.append, raising=False)
    names: dict = {}
    exec(compile(mutate.reaching(SOURCE, listed), "x", "exec"), names)
    assert names["f"](5) == 4
    assert set(reached) == set(listed)
    reached.clear()
    with pytest.raises(ValueError, match="6"):
        names["f"](5, (1,))
    assert {listed[number].kind for number in reached} == {"condition", "boolean", "comparison", "constant", "sign"}

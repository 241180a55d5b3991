"""Every example in a docstring runs, in the installed package."""

import doctest
import importlib
from pathlib import Path

import pytest

import sapwood

HOUSE = Path(sapwood.__file__).parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def _names() -> list[str]:
    """Found as files, not by importing: one module that fails to import is then one failing test."""
    rooms = [init.parent for init in HOUSE.glob("*/__init__.py")]
    files = [HOUSE / "__init__.py", HOUSE / "__main__.py", *(file for room in rooms for file in room.rglob("*.py"))]
    dotted = [".".join(("sapwood", *f.relative_to(HOUSE).with_suffix("").parts)) for f in files]
    return sorted(n.removesuffix(".__init__") for n in dotted)


@pytest.mark.costs("examples run op by op, as a reader types them, and each new op is a program")
@pytest.mark.parametrize("name", _names())
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example that writes a file writes it here
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    report: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)

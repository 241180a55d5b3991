"""What README.md and CONTRIBUTING.md print runs as printed."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page, without the indentation of a list they may stand in."""
    fence = re.compile(rf"^( *)```{language}\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
    text = page.read_text(encoding="utf-8")
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in fence.findall(text)]


def test_readme_has_exactly_two_set_up_commands(root):
    lines = [line for block in blocks(root / "README.md", "sh") for line in block.splitlines() if line.strip()]
    set_up = [line for line in lines if "pip install" in line]
    assert len(set_up) == 2, set_up
    train, test = set_up
    assert "sapwood train digits" in train
    assert '".[test]"' in test  # .ci/run looks for this, and runs the line
    assert test.endswith("pytest")


@pytest.mark.slow
@pytest.mark.fresh_compile
def test_readme_examples_run(root, tmp_path):
    """Each begins with no names, one after the other in one process."""
    examples = blocks(root / "README.md", "python")
    assert examples
    run = "import sys\nfor i, example in enumerate(sys.argv[1:]): exec(compile(example, f'example {i}', 'exec'), {})"
    command = [sys.executable, "-c", run, *examples]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_layer_of_contributing(root):
    (example,) = blocks(root / "CONTRIBUTING.md", "python")
    names: dict = {}
    exec(compile(example, "CONTRIBUTING.md", "exec"), names)
    test = doctest.DocTestFinder().find(names["gated"], "gated", globs=names)
    assert [doctest.DocTestRunner().run(t).failed for t in test] == [0]

    rng = np.random.default_rng(0)
    x, kernel, gate = rng.normal(size=(2, 3)), rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    y = names["Gated"](4)({"kernel": kernel, "gate_kernel": gate}, x.astype("float32"))
    np.testing.assert_allclose(y, (x @ kernel) / (1 + np.exp(-x @ gate)), rtol=1e-5)


@pytest.mark.slow
def test_the_page_on_optimizers(root):
    for example in blocks(root / "docs/optimizers.md", "python"):
        exec(compile(example, "optimizers.md", "exec"), {})


def test_the_page_on_random_numbers(root):
    (example,) = blocks(root / "docs/randomness.md", "python")
    exec(compile(example, "randomness.md", "exec"), {})


def test_the_page_on_reading_names_what_is_there(root):
    """Each file that `docs/reading.md` links to, and each function or class that it names beside it."""
    text = (root / "docs/reading.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(\.\./([\w/]+\.py)\)(?:\s+`([\w.]+)`)?", text)
    assert len(links) > 30
    for file, name in links:
        source = (root / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"(def|class) {name.split('.')[-1]}\b", source), (file, name)
    assert len(text.splitlines()) <= 65  # one screen

"""Ten programs that users of Keras write, in Sapwood: each reaches its figures, and docs/keras.md says how long it is.

Beside each lies the same program in Keras, which `pytest -m long` runs; it must reach the same figures. A bound is one
that a broken piece misses: in the table of `BOUNDS`, the comment says which piece, and what the figure is without it.
"""

import ast
import importlib.util
import re
import tokenize
from pathlib import Path

import pytest

HERE = Path(__file__).parent

BOUNDS = {
    "convnet": {"accuracy": (0.9, 1), "accuracy_aside": (0.88, 1)},  # images that do not move: aside 0.73
    "regression": {"epochs": (5, 40), "r2": (0.2, 0.6), "error": (30, 50)},  # no early stopping: R2 -0.23
    "forecast": {"error": (0, 0.3)},  # a state that is not carried: 0.99
    "two_outputs": {"benign_accuracy": (0.94, 1), "area_error_r2": (0.7, 1)},  # the first loss alone: R2 0.18
    "vae": {"reconstruction": (0.3, 0.34), "kl": (0.02, 0.07), "drawn_like_real": (0, 0.025)},  # no noise: 0.28, 0.006
    "transfer": {"accuracy": (0.74, 1), "trunk_moved": (0, 0)},  # nothing frozen: moved 0.70; not loaded: 0.62
    "multilabel": {"binary_f1": (0.93, 1), "subset_accuracy": (0.82, 1)},
    "imbalanced": {"auc": (0.93, 1), "binary_recall": (0.75, 1)},  # without weights: recall 0.37
    "custom": {"coverage": (0.65, 0.95), "loss": (0.2, 0.32)},  # medians for bounds: coverage 0, loss 0.60
    "masked": {"accuracy": (0.7, 1)},  # no mask: 0.55
}
PLAIN = ("custom", "imbalanced")


def run(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


def check(figures, bounds):
    for name, (low, high) in bounds.items():
        assert low <= figures[name] <= high, f"{name} is {figures[name]:.4g}, {low} to {high} is expected"


def marked(name):
    why = "a whole program: what it compiles is its own"
    return pytest.param(name, marks=pytest.mark.costs(why) if name in PLAIN else pytest.mark.slow)


@pytest.mark.parametrize("name", [marked(name) for name in BOUNDS])
def test_port(name):
    check(run(name), BOUNDS[name])


@pytest.mark.long
@pytest.mark.parametrize("name", BOUNDS)
def test_keras_reaches_the_same_figures(name):
    check(run(f"keras_{name}"), BOUNDS[name])


def code_lines(path):
    """Lines of code, without those that are empty, a comment or a docstring.

    A docstring is counted nowhere, since both programs have it alike.
    """
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    with tokenize.open(path) as file:
        tokens = [t for t in tokenize.generate_tokens(file.readline) if t.type not in layout]
    lines = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def table(page):
    """The rows of the page's table, cell by cell."""
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| [")]
    return {re.search(r"ports/(\w+)\.py", row[0])[1]: [cell.strip() for cell in row[1:]] for row in rows}


def test_the_page_counts_the_lines(root):
    rows = table((root / "docs" / "keras.md").read_text(encoding="utf-8"))
    counted = {name: (code_lines(HERE / f"{name}.py"), code_lines(HERE / f"keras_{name}.py")) for name in BOUNDS}
    assert {name: (int(row[0]), int(row[1])) for name, row in rows.items()} == counted
    for name, (ours, theirs) in counted.items():
        assert bool(rows[name][2]) == (ours > theirs), f"{name}: the page says why it is longer, if it is"


def test_the_page_shows_what_runs(root):
    page = (root / "docs" / "keras.md").read_text(encoding="utf-8")
    for name in ("imbalanced", "keras_imbalanced"):
        program = (HERE / f"{name}.py").read_text(encoding="utf-8").partition("\n\nif __name__")[0]
        assert program.strip() in page

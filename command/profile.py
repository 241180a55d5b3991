"""``sapwood profile RECIPE``: measures the time of a training step by layer path."""

import argparse
from pathlib import Path

from sapwood.command import options


def main(arguments: list[str]) -> None:
    """Profile steps of a recipe and write an HTML page. Print the table of times, and the paths of page and trace."""
    from sapwood.experiment.finding import find

    parser = options.Parser("profile", "where the time of a recipe's training step goes, by layer path")
    parser.add_argument("recipe", help="a recipe's name, or the path of a Python file that defines one")
    parser.add_argument("--steps", type=int, metavar="N", default=20, help="steps to trace; default: 20")
    parser.add_argument("--levels", type=levels, metavar="N", help="how deep the table goes; default: all of it")
    parser.add_argument("--out", metavar="DIR|FILE.html", type=Path,
                        help="where page and trace go; default: profile-RECIPE")  # fmt: skip
    options.add_machine(parser)
    if arguments and not arguments[0].startswith("-"):
        options.add_fields(parser, find(arguments[0]))
    found = parser.read(arguments)
    recipe = find(found.recipe)(**options.fields_of(found))
    where = options.machine(found)
    page, trace = places(found.out.expanduser() if found.out else Path(f"profile-{Path(found.recipe).stem}"))

    from sapwood.experiment.experiment import Experiment
    from sapwood.inspection import profile

    experiment = Experiment(found.recipe, recipe, page.parent, where)
    made = profile(
        experiment.trainer, experiment.train_data[0],
        steps=found.steps, batch_size=experiment.batch_size, seed=recipe.seed, out=trace,
    )  # fmt: skip
    page.write_text(made.html(), encoding="utf-8")
    print(f"page {page}\ntrace {trace} (Perfetto and XProf open what is in it)\n\n{made.table(found.levels)}")


def levels(word: str) -> int:
    """Parse ``--levels``: the depth of the table, a number of at least 1."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1 is expected, not {word!r}")
    return int(word)


def places(out: Path) -> tuple[Path, Path]:
    """The path of the HTML page and of the directory of the raw trace, from ``--out``.

    If ``out`` is ``NAME.html``, it is the page, and the directory is ``NAME-trace`` beside it. Otherwise ``out`` is the
    directory, and the page is ``profile.html`` in it.
    """
    if out.suffix == ".html":
        return out, out.with_name(f"{out.stem}-trace")
    return out / "profile.html", out

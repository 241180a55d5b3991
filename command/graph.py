"""``sapwood graph RECIPE``: draws the model by layer path as SVG or HTML."""

import argparse
from pathlib import Path

from sapwood.command.summary import read


def main(arguments: list[str]) -> None:
    """Write the picture to ``--out``, by default ``RECIPE.html``, and print its path."""
    import sapwood as sw

    out = ("--out", {"metavar": "FILE", "type": file, "help": "FILE.html, where groups open and close, or FILE.svg"})
    recipe, inputs, policy, found = read("graph", "a recipe's model as SVG or HTML", arguments, out)
    path = found.out or Path(f"{Path(found.recipe).stem}.html")
    picture = sw.graph(recipe.model, *inputs, policy=policy)
    path.write_text(picture.html() if path.suffix == ".html" else picture.svg(), encoding="utf-8")
    print(path)


def file(name: str) -> Path:
    """Parse ``--out``: a path that ends in .html or .svg."""
    if Path(name).suffix not in (".html", ".svg"):
        raise argparse.ArgumentTypeError(f"a name that ends in .html or .svg is expected, not {name!r}")
    return Path(name).expanduser()

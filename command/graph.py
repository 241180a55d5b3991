"""``sapwood graph RECIPE``: the model drawn by layer path."""

from pathlib import Path

from sapwood.command.summary import read
from sapwood.core.errors import ConfigError


def main(arguments: list[str]) -> None:
    """Write the picture, ``RECIPE.html`` unless said otherwise, and say where it is."""
    import sapwood as sw

    out = ("--out", {"metavar": "FILE", "help": "FILE.html, where groups open and close, or FILE.svg"})
    recipe, inputs, found = read("graph", "a recipe's model as SVG or HTML", arguments, out)
    path = Path(found.out or f"{Path(found.recipe).stem}.html")
    if path.suffix not in (".html", ".svg"):
        raise ConfigError(f"--out {path}: a name that ends in .html or .svg is expected")
    picture = sw.graph(recipe.model, *inputs)
    path.write_text(picture.html() if path.suffix == ".html" else picture.svg(), encoding="utf-8")
    print(path)

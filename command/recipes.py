"""``sapwood recipes``: lists the built-in recipes."""

from sapwood.command import options


def main(arguments: list[str]) -> None:
    """Print the name of each recipe and the first line of its docstring."""
    options.Parser("recipes", "the recipes there are").read(arguments)
    from sapwood.experiment.finding import BUILT_IN, find

    for name in BUILT_IN:
        print(f"{name:12} {options.about(find(name))}")

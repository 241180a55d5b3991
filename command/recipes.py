"""``sapwood recipes``: the recipes there are."""

from sapwood.command import options


def main(arguments: list[str]) -> None:
    """Print each recipe's name and what it does."""
    options.Parser("recipes", "the recipes there are").read(arguments)
    from sapwood.experiment.finding import BUILT_IN, find

    for name in BUILT_IN:
        print(f"{name:12} {options.about(find(name))}")

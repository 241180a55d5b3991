"""``sapwood summary RECIPE``: prints the layers, shapes, parameters and FLOPs of a recipe's model."""

import sys
from pathlib import Path
from typing import Any

from sapwood.command import options
from sapwood.core.errors import ConfigError, DataError
from sapwood.core.messages import nearest


def main(arguments: list[str]) -> None:
    """Print the table of the recipe's model."""
    import sapwood as sw

    recipe, inputs, policy, _ = read("summary", "a recipe's layers, shapes, parameters and FLOPs", arguments)
    table = sw.summary(recipe.model, *inputs, policy=policy)
    if sys.stdout.isatty():
        table.show()
    else:  # a file or a pipe has no width; rich would truncate the numbers
        print(table)


def read(command: str, about: str, arguments: list[str], *more: tuple[str, dict]) -> tuple[Any, tuple, Any, Any]:
    """Parse the options of a command about a recipe's model.

    Args:
        command: the name of the command.
        about: the description for ``--help``.
        arguments: the words of the command line after the command.
        more: further options of the command, each ``(name, settings of add_argument)``.

    Returns:
        The recipe with its hyper-parameters, a `jax.ShapeDtypeStruct` of one batch for each of its model's inputs, the
        policy of its precision, and the parsed options.

    Raises:
        ConfigError: an option is wrong, or the objective does not name the model's inputs.
        DataError: the data has no entry for an input.
    """
    import jax

    from sapwood.experiment.experiment import Experiment
    from sapwood.experiment.finding import find

    parser = options.Parser(command, about)
    parser.add_argument("recipe", help="a recipe's name, or the path of a Python file that defines one")
    for name, settings in more:
        parser.add_argument(name, **settings)
    if arguments and not arguments[0].startswith("-"):
        options.add_fields(parser, find(arguments[0]))
    found = parser.read(arguments)
    recipe = find(found.recipe)(**options.fields_of(found))
    experiment = Experiment(found.recipe, recipe, Path("."))
    features, objective = experiment.data[0].features, recipe.objective()
    if not hasattr(objective, "inputs"):
        raise ConfigError(
            f"the objective of {found.recipe} does not name the model's inputs; sw.supervised makes one that does"
        )
    for name in objective.inputs:
        if name not in features:
            raise DataError(
                f"the data of {found.recipe} has no entry {name!r}, which its model takes{nearest(name, features)} "
                f"(it has {', '.join(features)})"
            )
    inputs = tuple(
        jax.ShapeDtypeStruct((experiment.batch_size, *features[name].shape), features[name].dtype)
        for name in objective.inputs
    )
    return recipe, inputs, recipe._policy(), found

"""``sapwood summary RECIPE``: its layers, shapes, parameters and FLOPs."""

from typing import Any

from sapwood.command import options


def main(arguments: list[str]) -> None:
    """Print the table of the recipe's model."""
    import sapwood as sw

    recipe, inputs, _ = read("summary", "a recipe's layers, shapes, parameters and FLOPs", arguments)
    sw.summary(recipe.model, *inputs).show()


def read(command: str, about: str, arguments: list[str], *more: tuple[str, dict]) -> tuple[Any, tuple, Any]:
    """A recipe with its hyper-parameters, shapes of one batch of its model's inputs, and the options."""
    import jax

    from sapwood.recipes.registry import find

    parser = options.Parser(command, about)
    parser.add_argument("recipe", help="a recipe's name, or the path of a Python file that defines one")
    for name, settings in more:
        parser.add_argument(name, **settings)
    if arguments and not arguments[0].startswith("-"):
        options.add_fields(parser, find(arguments[0]))
    found = parser.read(arguments)
    recipe = find(found.recipe)(**options.fields_of(found))
    features = recipe.data()[0].features
    inputs = tuple(
        jax.ShapeDtypeStruct((recipe.batch_size, *features[name].shape), features[name].dtype)
        for name in recipe.objective().inputs
    )
    return recipe, inputs, found

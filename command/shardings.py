"""``sapwood shardings RECIPE --mesh AXES``: shows the sharding of each array on a mesh, without the mesh's devices."""

import argparse
import os
import warnings
from pathlib import Path

from sapwood.command import options
from sapwood.core.errors import ConfigError


def main(arguments: list[str]) -> None:
    """Print the table of parameters, optimizer state, batch and activations, or write it as a page to ``--out``."""
    from sapwood.experiment.finding import find

    parser = options.Parser("shardings", "where parameters, optimizer state and activations of a recipe live on a mesh")
    parser.add_argument("recipe", help="a recipe's name, or the path of a Python file that defines one")
    parser.add_argument("--mesh", metavar="AXES", required=True, help='the mesh, such as "fsdp=64,tensor=8"')
    parser.add_argument("--rules", metavar="NAME", help="the table from logical axes to mesh axes")
    parser.add_argument("--devices", type=int, metavar="N", help="how many devices there are, where an axis is -1")
    parser.add_argument("--out", type=page, metavar="FILE.html", help="write a page too: who holds which slice of what")
    if arguments and not arguments[0].startswith("-"):
        options.add_fields(parser, find(arguments[0]))
    found = parser.read(arguments)
    recipe = find(found.recipe)(**options.fields_of(found))
    shown = layout(recipe, found)
    if found.out is not None:
        found.out.write_text(shown.html(), encoding="utf-8")
        print(found.out)
        return
    from rich.console import Console

    wide = "COLUMNS" in os.environ or Console().is_terminal
    Console(width=None if wide else 160).print(shown)  # a file or a pipe has no width


def layout(recipe, found: argparse.Namespace):
    """The layout of the recipe's training on the mesh of the options.

    A batch size that the batch axes of the mesh do not divide is rounded up, with a note.
    """
    import jax

    from sapwood import parallel
    from sapwood.experiment.experiment import Experiment
    from sapwood.inspection.layouts.training import layout
    from sapwood.parallel.meshes import abstract

    if found.devices is not None and found.devices < 1:
        raise ConfigError(f"--devices {found.devices}: at least one device is needed")
    mesh = abstract(found.mesh, found.devices)
    split = parallel.shards(parallel.batch_sharding(mesh, found.rules))  # raises if mesh and rules do not fit
    experiment = Experiment(found.recipe, recipe, Path("."))
    rows, notes = -(-experiment.batch_size // split) * split, []
    if rows != experiment.batch_size:
        notes.append(f"batch size {experiment.batch_size} does not divide over its {split} parts: shown for {rows}")
    features = experiment.data[0].features
    batch = {name: jax.ShapeDtypeStruct((rows, *f.shape), f.dtype) for name, f in features.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", parallel.ShardingWarning)
        shown = layout(recipe.trainer(1000, mesh=mesh, rules=found.rules), batch)
    notes += dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, parallel.ShardingWarning))
    title = f"{Path(found.recipe).stem}, {found.rules or 'default'} rules"
    return shown._replace(title=title, notes=tuple(notes))


def page(name: str) -> Path:
    """Parse ``--out``: a path that ends in .html."""
    if Path(name).suffix != ".html":
        raise argparse.ArgumentTypeError(f"a name that ends in .html is expected, not {name!r}")
    return Path(name).expanduser()

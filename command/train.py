"""``sapwood train RECIPE``: train it, test it, and leave everything in a run directory."""

import argparse
from pathlib import Path
from typing import Any

from sapwood.command import options
from sapwood.core.errors import ConfigError


def main(arguments: list[str]) -> None:
    """Train a recipe; the last three lines are ``run``, ``test accuracy`` and ``digest``."""
    recipe, name, found = read(arguments)
    from sapwood.recipes.experiment import Experiment

    directory = Path(found.run) if found.run else next_run(name, found.resume)
    where = {**options.machine(found), **({"jit": False} if found.eager else {})}
    experiment = Experiment(name, recipe(**options.fields_of(found)), directory, where)
    more = {"checkpoint_every": found.checkpoint_every, "log_every": found.log_every, "keep": found.keep}
    state = experiment.train(found.resume, best=found.best, **more)
    finish(experiment, state)


def read(arguments: list[str]) -> tuple[type, str, argparse.Namespace]:
    """The recipe class, its name, and the options."""
    from sapwood.recipes.registry import BUILT_IN, find

    name = next((word for word in arguments[:1] if not word.startswith("-")), None)
    if name is None:
        if arguments[:1] in (["-h"], ["--help"]):
            parser(None).print_help()
            raise SystemExit(0)
        raise ConfigError(f"name a recipe: sapwood train RECIPE (recipes: {', '.join(BUILT_IN)}, or a Python file)")
    recipe = find(name)
    return recipe, name, parser(recipe).read(arguments)


def parser(recipe: Any) -> options.Parser:
    """The options of the command, and those of a recipe."""
    made = options.Parser("train", options.about(recipe) if recipe else "train a recipe")
    made.add_argument("recipe", help="a recipe's name, or the path of a Python file that defines one")
    made.add_argument(
        "--run", metavar="DIR", help="the run directory; by default runs/RECIPE-NNN, the next free number"
    )
    made.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint, or start where there is none"
    )
    made.add_argument(
        "--checkpoint-every", type=int, metavar="STEPS", help="steps between checkpoints; default an epoch"
    )
    made.add_argument("--keep", type=int, metavar="N", default=2, help="how many of the newest checkpoints stay")
    made.add_argument("--best", metavar="METRIC", help="also keep the best checkpoint, such as max:validation_accuracy")
    made.add_argument("--log-every", type=int, metavar="STEPS", help="steps between rows of metrics; default an epoch")
    made.add_argument("--eager", action="store_true", help="run every step as plain Python, for breakpoints in layers")
    options.add_machine(made)
    if recipe is not None:
        options.add_fields(made, recipe)
    return made


def next_run(name: str, resume: bool) -> Path:
    """``runs/NAME-NNN``: the next free number, or the last one where it is to be resumed."""
    stem = Path(name).stem
    taken = sorted(
        int(p.name[len(stem) + 1 :]) for p in Path("runs").glob(f"{stem}-*") if p.name[len(stem) + 1 :].isdigit()
    )
    number = taken[-1] if taken and resume else (taken[-1] if taken else 0) + 1
    return Path("runs") / f"{stem}-{number:03}"


def finish(experiment: Any, state: Any) -> None:
    """Test, draw, save the model, and say the result."""
    from sapwood.train import curves
    from sapwood.train.digest import tree_digest

    drawing = curves.start(experiment.directory / "metrics.jsonl", experiment.name)
    scores = experiment.test(state)
    params = experiment.trainer.eval_params(state)
    if (report := experiment.recipe.report(params, state.state)) is not None:
        print(report)
    if drawing.wait() != 0:
        print(f"curves.png could not be drawn: {drawing.stderr.read().decode().strip().splitlines()[-1]}")
    print(f"run {experiment.directory}")
    print(f"test accuracy {scores['accuracy']:.4f}" if "accuracy" in scores else f"test loss {scores['loss']:.4f}")
    print(f"digest {tree_digest(state.params)}", flush=True)

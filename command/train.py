"""``sapwood train RECIPE``: train it, test it, and leave everything in a run directory."""

import argparse
import contextlib
import dataclasses
import glob
import itertools
import sys
from pathlib import Path
from typing import Any

from sapwood.command import options
from sapwood.core.errors import ConfigError


def main(arguments: list[str]) -> None:
    """Train a recipe; the last three lines are ``run``, ``test accuracy`` and ``digest``."""
    kind, name, found = read(arguments)
    from sapwood.recipes.experiment import Experiment
    from sapwood.recipes.registry import full_name
    from sapwood.train.compile_cache import compile_cache

    where = {**options.machine(found), **({"jit": False} if found.eager else {})}
    experiment = Experiment(
        full_name(name), kind(**options.fields_of(found)), Path(found.run or ".").expanduser(), where
    )
    if not found.run:
        experiment = dataclasses.replace(experiment, directory=own_directory(experiment, found.resume))
    more = {"checkpoint_every": found.checkpoint_every, "log_every": found.log_every, "keep": found.keep}
    with compile_cache(found.compile_cache):
        try:
            state = experiment.train(found.resume, best=found.best, steps_per_call=found.steps_per_call, **more)
        finally:
            with contextlib.suppress(OSError):  # a run that never began leaves nothing behind
                experiment.directory.rmdir()
                if not found.run:
                    experiment.directory.parent.rmdir()
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
    made = parser(recipe)
    made.help_command = f"sapwood train {name} --help"
    return recipe, name, made.read(arguments)


def parser(recipe: Any) -> options.Parser:
    """The options of the command, and those of a recipe."""
    made = options.Parser("train", options.about(recipe) if recipe else "train a recipe")
    made.add_argument("recipe", help="a recipe's name, or the path of a Python file that defines one")
    made.add_argument(
        "--run", metavar="DIR", help="the run directory; by default runs/RECIPE-NNN, the next free number"
    )
    made.add_argument(
        "--resume", nargs="?", const=True, default=False, choices=("anyway",),
        help="go on from the last checkpoint, or start where there is none; anyway: also where epochs, other options "
        "or the code have changed meanwhile, which it says",
    )  # fmt: skip
    made.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="steps between checkpoints; default an epoch, 200 at least",
    )
    made.add_argument("--keep", type=int, metavar="N", default=2, help="how many of the newest checkpoints stay")
    made.add_argument(
        "--best",
        metavar="METRIC",
        type=best,
        help="end with the best checkpoint, not the last: max:validation_accuracy, min:loss, ...",
    )
    made.add_argument("--log-every", type=int, metavar="STEPS", help="steps between rows of metrics; default an epoch")
    made.add_argument(
        "--steps-per-call",
        metavar="N",
        type=steps_per_call,
        default="auto",
        help="steps that go to the device as one program; auto, the default, measures whether that pays",
    )
    made.add_argument(
        "--compile-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep compiled programs in the user's cache directory ($SAPWOOD_CACHE) for the next start",
    )
    made.add_argument("--eager", action="store_true", help="run every step as plain Python, for breakpoints in layers")
    options.add_machine(made)
    if recipe is not None:
        options.add_fields(made, recipe)
    return made


def best(word: str) -> str:
    """``max:accuracy`` or ``min:loss``, as `fit` takes it."""
    from sapwood.train.goal import goal

    try:
        return str(goal(word))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def steps_per_call(word: str) -> int | str:
    """A whole number, or "auto", as `fit` takes it."""
    if word != "auto" and not (word.isdecimal() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"a whole number, at least 1, or auto is expected, not {word!r}")
    return word if word == "auto" else int(word)


def own_directory(experiment: Any, resume: bool | str) -> Path:
    """``runs/RECIPE-NNN``, made: the next free number, or the newest run of just this recipe and hyper-parameters where
    one is to be resumed ("anyway": of this recipe). (A command killed before it had a directory goes on in a new one,
    not in another's.)
    """
    from sapwood.recipes.experiment import read_config

    stem, runs = Path(experiment.name).stem, Path("runs")
    taken = {
        int(p.name[len(stem) + 1 :]): p
        for p in runs.glob(f"{glob.escape(stem)}-*")
        if p.name[len(stem) + 1 :].isdecimal()
    }
    for number in sorted(taken, reverse=True) if resume else ():
        config = read_config(taken[number])
        same = config is None or (resume == "anyway" and config["recipe"] == experiment.name)
        if same or not (differences := experiment.differences(config)):
            return taken[number]
        print(f"{taken[number]} is another run: {', '.join(differences)}", file=sys.stderr)
    runs.mkdir(exist_ok=True)  # outside of the loop, which would try again for ever where this is a broken link
    for number in itertools.count(max(taken, default=0) + 1):
        with contextlib.suppress(FileExistsError):  # of two commands at once each gets its own
            directory = runs / f"{stem}-{number:03}"
            directory.mkdir(parents=True)
            return directory
    raise AssertionError


def finish(experiment: Any, state: Any) -> None:
    """Test, draw, save the model, and say the result."""
    from sapwood.train import curves
    from sapwood.train.digest import tree_digest

    drawing = curves.start(experiment.directory / "metrics.jsonl", Path(experiment.name).stem)
    scores = experiment.test(state)
    if (report := experiment.recipe.report(*experiment.trainer.eval_variables(state))) is not None:
        print(report)
    experiment.save(state)
    if drawing.wait() != 0:
        said = (drawing.stderr.read() if drawing.stderr else b"").decode().split("\n")
        print(f"curves.png could not be drawn: {' '.join(said[-2:]).strip()}", file=sys.stderr)
    print(f"run {experiment.directory}")
    print(f"test accuracy {scores['accuracy']:.4f}" if "accuracy" in scores else f"test loss {scores['loss']:.4f}")
    print(f"digest {tree_digest(state.params)}", flush=True)

"""``sapwood train RECIPE``: trains and tests a recipe, and writes everything into a run directory."""

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
    """Train a recipe. The last three lines of output start with ``run``, ``test accuracy`` and ``digest``.

    ``test loss`` stands for ``test accuracy`` if the recipe has no accuracy.
    """
    kind, name, found = read(arguments)
    from sapwood.experiment.experiment import Experiment
    from sapwood.experiment.finding import full_name
    from sapwood.runtime.compile_cache import compile_cache
    from sapwood.runtime.processes import run_on_first_process

    where = {**options.machine(found), **({"jit": False} if found.eager else {})}
    experiment = Experiment(
        full_name(name), kind(**options.fields_of(found)), Path(found.run or ".").expanduser(), where
    )
    if not found.run:
        directory = run_on_first_process(lambda: str(own_directory(experiment, found.resume)))
        experiment = dataclasses.replace(experiment, directory=Path(directory))
    more = {name: getattr(found, name) for name in FOR_FIT}
    try:
        with compile_cache(found.compile_cache), experiment.writer:
            finish(experiment, experiment.train(found.resume, **more))
    finally:
        with contextlib.suppress(OSError):  # removes the directory only if it is empty
            experiment.directory.rmdir()
            if not found.run:
                experiment.directory.parent.rmdir()


FOR_FIT = ("checkpoint_every", "log_every", "keep", "best", "steps_per_call", "grace", "save_nonfinite")
"""The options that are passed to `fit` under the same names."""


def read(arguments: list[str]) -> tuple[type, str, argparse.Namespace]:
    """Parse the command line. Returns the recipe class, its name as given, and the options."""
    from sapwood.experiment.finding import BUILT_IN, find

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
    """The parser for the options of the command and of ``recipe``; None makes it for the command only."""
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
        "--grace",
        type=seconds,
        metavar="SECONDS",
        default=30.0,
        help="how long after a SIGTERM the command may take to save a checkpoint and end; default 30",
    )
    made.add_argument(
        "--save-nonfinite",
        action="store_true",
        help="save a checkpoint also where a parameter is NaN or infinite; by default that ends the run",
    )
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
    """Parse ``--best``: ``max:METRIC`` or ``min:METRIC``, as `fit` takes it."""
    from sapwood.saving.best_metric import goal

    try:
        return str(goal(word))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seconds(word: str) -> float:
    """Parse ``--grace``: a finite number of seconds, at least 0."""
    try:
        number = float(word)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of seconds, at least 0, is expected, not {word!r}")
    return number


def steps_per_call(word: str) -> int | str:
    """Parse ``--steps-per-call``: an integer of at least 1, or "auto", as `fit` takes it."""
    if word != "auto" and not (word.isdecimal() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"a whole number, at least 1, or auto is expected, not {word!r}")
    return word if word == "auto" else int(word)


def own_directory(experiment: Any, resume: bool | str) -> Path:
    """Choose the run directory ``runs/RECIPE-NNN``; a new one is created with the next free number.

    With ``resume=True`` the newest run with the same recipe and equal hyper-parameters is chosen, and with "anyway" the
    newest run of the same recipe. A run directory without a config is chosen too. If there is no such run, a new
    directory is created, so a command that was killed before it had a directory does not continue another one's run.
    """
    from sapwood.experiment.experiment import read_config, same_recipe

    stem, runs = Path(experiment.name).stem, Path("runs")
    taken = {
        int(p.name[len(stem) + 1 :]): p
        for p in runs.glob(f"{glob.escape(stem)}-*")
        if p.name[len(stem) + 1 :].isdecimal()
    }
    for number in sorted(taken, reverse=True) if resume else ():
        config = read_config(taken[number])
        same = config is None or (resume == "anyway" and same_recipe(config["recipe"], experiment.name))
        if same or not (differences := experiment.differences(config)):
            return taken[number]
        print(f"{taken[number]} is another run: {', '.join(differences)}", file=sys.stderr)
    runs.mkdir(exist_ok=True)  # outside of the loop, which would never end if this is a broken link
    for number in itertools.count(max(taken, default=0) + 1):
        with contextlib.suppress(FileExistsError):  # two commands at once get different directories
            directory = runs / f"{stem}-{number:03}"
            directory.mkdir(parents=True)
            return directory
    raise AssertionError


def finish(experiment: Any, state: Any) -> None:
    """Test the state, draw the curves, save the model and print the results.

    With several processes only the first one draws and prints.
    """
    import jax

    from sapwood.runtime.terminal import say
    from sapwood.saving.digest import tree_digest
    from sapwood.train.record import curves

    first = jax.process_index() == 0
    drawing = curves.start(experiment.directory / "metrics.jsonl", Path(experiment.name).stem) if first else None
    scores = experiment.test(state)
    report = experiment.recipe.report(*experiment.trainer.eval_variables(state))
    experiment.save(state)
    digest = tree_digest(state.params)
    if drawing is None:
        return
    if drawing.wait() != 0:
        said = (drawing.stderr.read() if drawing.stderr else b"").decode().split("\n")
        say(f"curves.png could not be drawn: {' '.join(said[-2:]).strip()}")
    score = f"accuracy {scores['accuracy']:.4f}" if "accuracy" in scores else f"loss {scores['loss']:.4f}"
    for line in (report, f"run {experiment.directory}", f"test {score}", f"digest {digest}"):
        if line is None:
            continue
        if not say(str(line), sys.stdout):
            say(str(line))  # if nobody reads stdout, print to stderr

"""One training step of a recipe against the same step written by hand in plain JAX, interleaved, an A/A run beside.

    python benchmarks/step.py [--rounds 40] [--steps 100]

For `digits-mlp` and `digits`: the hand-written step twice (A/A: identical programs), Sapwood's with its default-on
extras off, and with each of them on. Each round times a run of steps of every program in a random order. Prints the
median ratio to the hand-written step with its 95 % interval (bootstrap over rounds), and the operations added.
"""

import argparse
import importlib.util
import random
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sapwood as sw
from sapwood.recipes.digits import Digits
from sapwood.recipes.digits_mlp import DigitsMLP


def load(path: Path):
    """A module from the tests, which are not installed."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TESTS = Path(__file__).parent.parent / "tests" / "recipes"
handwritten, counts = load(TESTS / "handwritten.py"), load(TESTS / "test_op_counts.py")
EXTRAS = {
    "sapwood, extras off": {"checks": False},
    "+ checks": {"checks": True},
    "+ accuracy": {"checks": False, "metrics": ("accuracy",)},
    "sapwood, defaults": {"checks": True, "metrics": ("accuracy",)},
}


def programs(recipe, loss, batch):
    """Every program as (compiled step, first state), by name."""
    optimizer = recipe.optimizer(10_000)
    params, state = sw.init(recipe.model, 0, batch["image"])

    def fresh():
        copy = jax.tree.map(jnp.copy, (params, state))
        return *copy, optimizer.init(params), jax.random.key(0), jnp.int32(0)

    floor = lambda state, batch: handwritten.train_step(loss, optimizer, state, batch)  # noqa: E731
    made = {
        name: (jax.jit(floor, donate_argnums=0).lower(fresh(), batch).compile(), fresh()) for name in ("A", "A again")
    }
    for name, options in EXTRAS.items():
        options = dict(options)
        objective = sw.supervised(recipe.model, metrics=options.pop("metrics", ()))
        trainer = sw.Trainer(objective, optimizer, **options)
        first = trainer.init(0, batch)
        made[name] = jax.jit(trainer.step, donate_argnums=0).lower(first, batch).compile(), first
    return made


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval."""
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def race(made, batch, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each program in each round."""
    states = {name: state for name, (_, state) in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds + 1):
        for name in random.sample(list(made), len(made)):
            step, state = made[name][0], states[name]
            begin = time.perf_counter()
            for _ in range(steps):
                state, _metrics = step(state, batch)
            jax.block_until_ready(state)
            seconds[name].append((time.perf_counter() - begin) / steps)
            states[name] = state
    return {name: found[1:] for name, found in seconds.items()}  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(0, 17, (32, 8, 8, 1), "uint8"), "label": rng.integers(0, 10, 32, "int32")}
    batch = jax.device_put(batch)
    for recipe, loss in ((DigitsMLP(), handwritten.mlp_loss), (Digits(), handwritten.conv_loss)):
        seconds = race(programs(recipe, loss, batch), batch, options.rounds, options.steps)
        plain = counts.ours(recipe, checks=False).total()
        print(
            f"\n{type(recipe).__name__}: hand-written step {np.median(seconds['A']) * 1e3:.3f} ms, {plain} operations"
        )
        for name in list(seconds)[1:]:
            median, low, high = interval([b / a for a, b in zip(seconds["A"], seconds[name], strict=True)])
            added = f"{counts.ours(recipe, **EXTRAS[name]).total() - plain:+d} operations" if name in EXTRAS else "A/A"
            print(f"  {name:22} {median:.3f} of it, 95 % interval {low:.3f} to {high:.3f}   {added}", flush=True)


if __name__ == "__main__":
    main()

"""Wall time and accuracy of the whole command `sapwood train digits` and of the Keras script, run in turns.

    python benchmarks/digits_race.py [--rounds 5]

One round is one run of each with the same seed. The data is prepared before, and no compilation is cached. Prints the
two median times, the ratio of each round, and the mean test accuracies.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KERAS = Path(__file__).parent / "digits_keras.py"


def run(command: list[str]) -> tuple[float, float]:
    """Run one whole command; returns its seconds and its test accuracy."""
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir())
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return seconds, float(re.findall(r"test accuracy ([\d.]+)", done.stdout)[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    subprocess.run([sys.executable, "-c", "import sapwood; sapwood.data.load('digits')"], check=True)
    results: dict[str, list[tuple[float, float]]] = {"sapwood": [], "keras": []}
    for seed in range(rounds):
        with tempfile.TemporaryDirectory() as runs:
            sapwood = [sys.executable, "-m", "sapwood", "train", "digits", "--seed", str(seed), "--run", f"{runs}/run",
                       "--no-compile-cache"]  # fmt: skip
            keras = [sys.executable, str(KERAS), "--seed", str(seed)]
            for name, command in [("sapwood", sapwood), ("keras", keras)]:
                results[name].append(run(command))
                seconds, accuracy = results[name][-1]
                print(f"seed {seed}  {name:8} {seconds:6.2f} s  accuracy {accuracy:.4f}", flush=True)
    for name, found in results.items():
        median = statistics.median(seconds for seconds, _ in found)
        mean = statistics.mean(accuracy for _, accuracy in found)
        print(f"{name:8} median {median:.2f} s  mean accuracy {mean:.4f}")
    ratios = [a / b for (a, _), (b, _) in zip(results["sapwood"], results["keras"], strict=True)]
    print(f"sapwood / keras: median {statistics.median(ratios):.2f}, rounds {', '.join(f'{r:.2f}' for r in ratios)}")


if __name__ == "__main__":
    main()

"""``sapwood evaluate RUN``: prints the test metrics of a run's best checkpoint, or of its last if it keeps no best."""

import numpy as np

from sapwood.command import options


def main(arguments: list[str]) -> None:
    """Print each test metric of the run on its own line."""
    parser = options.Parser(
        "evaluate", "the test metrics of a run: of its best checkpoint where it keeps one, else of its last"
    )
    parser.add_argument("run", help="the run directory")
    options.add_step(parser)
    options.add_trust(parser)
    options.add_machine(parser)
    found = parser.read(arguments)
    from sapwood.experiment.experiment import Experiment

    experiment = Experiment.open(found.run, options.machine(found), found.trust)
    for name, value in experiment.test(experiment.restore(found.step)).items():
        print(f"test {name} {np.asarray(value).tolist() if np.ndim(value) else f'{value:.4f}'}")

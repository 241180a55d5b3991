"""The child process of a race: it runs one system. `python -m benchmarks.worker RACE SYSTEM DIRECTORY THREADS`.

It answers the parent in JSON lines on stdout. What libraries print goes to stderr, so stdout holds nothing else.
"""

import json
import os
import sys


class Pipe:
    """The `Channel` over stdin and stdout."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # the parent is done; nothing here is worth an orderly end

    def report(self, **message) -> None:
        print(json.dumps(message), file=self.out)


def main(race: str, system: str, directory: str, threads: str) -> None:
    pipe = Pipe()
    if hasattr(os, "sched_setaffinity"):  # before any library counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    from benchmarks.suite import find
    from benchmarks.work import Work

    work = Work(find(race), system, directory)
    if work.suite.once is not None:
        pipe.report(**work.suite.once(work))
        return
    from benchmarks.systems import build

    job = build(work)
    pipe.report(losses=job.losses(10))
    job.rounds(pipe, work.suite.steps)


if __name__ == "__main__":
    main(*sys.argv[1:])

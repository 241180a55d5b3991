"""The instrument itself: its statistics, what it refuses, its command line, and one small race."""

import dataclasses
import functools
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import growth, page, race
from benchmarks.__main__ import main
from benchmarks.ratios import NOISE, Interval, interval, met, noise, ratio
from benchmarks.report import duration, table, verdict
from benchmarks.suite import Goal, Suite, beats, suites
from benchmarks.work import Work, prepare

RACE = Suite("r", "a race", systems=("floor", "floor again", "sapwood", "torch"), goals=beats("sapwood", "torch"))


def rounds(**seconds):
    """Rounds of the given seconds by system."""
    return [{name.replace("_", " "): {"step": x[i]} for name, x in seconds.items()}
            for i in range(len(next(iter(seconds.values()))))]  # fmt: skip


def test_the_interval_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.lognormal(0.0, 0.2, (200, 15))
    covered = [found.low <= 1 <= found.high for found in map(interval, draws)]
    assert 0.88 <= np.mean(covered) <= 1.0
    assert interval(draws[0]).median == np.median(draws[0])


def test_a_slow_round_of_the_machine_is_in_both_and_so_in_neither():
    found = ratio(rounds(floor=[1.0, 5.0, 1.0, 2.0], sapwood=[0.5, 2.5, 0.5, 1.0]), "sapwood", "floor", "step")
    assert found == Interval(0.5, 0.5, 0.5)


def test_the_noise_is_half_of_the_floors_interval_against_itself_and_no_excuse_beyond():
    measured = rounds(floor=[1.0] * 4, floor_again=[0.95, 1.0, 1.05, 1.1])
    found = ratio(measured, "floor again", "floor", "step")
    assert noise(RACE, measured, "step") == pytest.approx((found.high - found.low) / 2)
    assert noise(RACE, measured, "step") < NOISE
    assert noise(RACE, rounds(floor=[1.0] * 4, floor_again=[0.5, 1.0, 2.0, 3.0]), "step") == NOISE
    assert noise(RACE, rounds(floor=[1.0]), "step") == 0.0


def test_a_goal_is_met_when_the_upper_bound_is_under_it_and_the_noise():
    goal = Goal("sapwood", "floor", 1.02)
    assert met(goal, Interval(1.0, 0.98, 1.03), noise=0.02)
    assert not met(goal, Interval(1.0, 0.98, 1.05), noise=0.02)
    assert not met(goal, Interval(1.0, 0.98, 1.03), noise=0.0)  # the median alone does not do


def test_the_table_says_who_won():
    found = {"rounds": rounds(floor=[1.0] * 3, floor_again=[1.0] * 3, sapwood=[0.5] * 3, torch=[0.6] * 3)}
    header, *rows = table(RACE, found, "step")
    assert header == ["system", "step", "of the floor", "95 % interval", "goal"]
    assert [row[0] for row in rows] == list(RACE.systems)
    assert rows[1][-1] == "A/A"
    assert rows[2][2:4] == ["0.500", "0.500 to 0.500"]
    assert rows[3][-1] == "sapwood at 0.83 (0.83 to 0.83) of it: met"
    slow = {"rounds": rounds(floor=[1.0] * 3, sapwood=[0.7] * 3, torch=[0.6] * 3)}
    assert verdict(RACE, slow, RACE.goals[0]).endswith("not met")
    assert verdict(RACE, {"rounds": rounds(floor=[1.0], sapwood=[1.0])}, RACE.goals[0]) == ""
    seconds = {"rounds": rounds(floor=[1.0], sapwood=[2.5])}
    assert verdict(RACE, seconds, Goal("sapwood", None, 3.0)) == "2.50 s (2.50 to 2.50), at most 3 s: met"


def test_durations():
    assert [duration(x) for x in (2e-5, 0.0123, 1.5, 75)] == ["0.020 ms", "12.3 ms", "1.50 s", "75.0 s"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nlp"], "there is no suite 'nlp'; there are mlp, conv, gpt, deep, input, checkpoint, import, memory"),
        (["lstm"], "lstm waits for recurrent layers"),
        (["mlp", "--against", "floor,theano"], "there is no system 'theano'; there are floor, linen, nnx"),
        (["mlp", "--rounds", "0"], "at least one round"),
        (["mlp", "--threads", "100000"], "threads are expected"),
    ],
)
def test_what_cannot_be_asked_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in error
    assert error.count("\n") == 1


def test_losses_that_disagree_are_refused():
    floor = [2.0, 1.5, 1.0]
    race.agree(RACE, {"floor": floor, "torch": [2.0, 1.5004, 1.0]})
    with pytest.raises(
        race.Refused, match=r"torch does not do the floor's work: the loss of step 2 is 1\.6, the floor"
    ):
        race.agree(RACE, {"floor": floor, "torch": [2.0, 1.6, 1.0]})
    with pytest.raises(race.Refused, match="step 3 is nan"):
        race.agree(RACE, {"floor": floor, "torch": [2.0, 1.5, float("nan")]})


def test_a_system_with_other_weights_is_refused(tmp_path):
    """The same code from weights of which one is moved by a hundredth."""
    from benchmarks.systems import build

    suite = dataclasses.replace(suites("mlp")[0], epoch=4)
    prepare(suite, tmp_path)
    honest, disturbed = Work(suite, "floor", tmp_path), Work(suite, "floor", tmp_path)
    disturbed.weights["hidden"]["kernel"] *= 1.01
    losses = {"floor": build(honest).losses(4), "disturbed": build(disturbed).losses(4)}
    race.agree(suite, {"floor": losses["floor"], "again": losses["floor"]})
    with pytest.raises(race.Refused, match="disturbed does not do the floor's work: the loss of step"):
        race.agree(suite, losses)


def test_a_child_that_fails_says_why(tmp_path):
    child = race.Child(suites("mlp")[0], "theano", tmp_path, 1)
    with pytest.raises(race.Failed, match=r"theano failed: .*No module named 'benchmarks\.systems\.theano'"):
        child.answer()
    child.end()


def test_growth_is_fitted_and_held_to_theory():
    rows = [{"value": x, "seconds": [0.5 * x**2, 9.0 * x**2], "bytes": 7 * x} for x in (2, 4, 8)]
    assert growth.fits({"width": rows})["width"] == (pytest.approx(2.0), pytest.approx(1.0))
    assert growth.tables({"width": rows})[0][1][-1] == "met"
    assert growth.tables({"batch": rows})[0][1][-1] == "not met"  # twice the batch is to cost twice the time


@pytest.mark.costs("the first import of matplotlib, which draws the page's charts")
def test_the_page_is_filled_in_between_its_markers(tmp_path):
    names = ("floor", "floor again", "sapwood", "torch")
    measured = {"name": "mlp", "threads": 2, "failed": {}, "rounds": [{n: {"step": 0.001} for n in names}] * 3}
    machine = {"cpu": "a CPU", "cores": 2, "date": "2026-01-01T00:00", "python": "3.11", "versions": {"jax": "0.10"}}
    (tmp_path / "mlp.json").write_text(json.dumps({"machine": machine, "race": measured}))
    rows = [{"value": x, "seconds": [x], "bytes": x} for x in (2, 4)]
    (tmp_path / "growth.json").write_text(json.dumps({"machine": machine, "found": {"batch": rows, "layers": rows}}))
    (tmp_path / "benchmarks.md").write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    for _ in range(2):  # a second time changes nothing
        page.write(tmp_path, docs=tmp_path)
        written = (tmp_path / "benchmarks.md").read_text()
        assert "| sapwood | 1 ms | 1.000 | 1.000 to 1.000 | at most 0.6: not met |" in written
        assert "| batch | 2 to 4 | batch^1.00 | batch^1.00 | batch^1 | met |" in written
        assert written.startswith("before\n")
        assert written.endswith("after\n")
        assert "old" not in written
    assert (tmp_path / "benchmarks.svg").read_text().count("sapwood") == 1
    assert (tmp_path / "growth.svg").exists()


def run(tmp_path, *words):
    """The benchmarks as a command, in the root; what it printed and what it wrote."""
    done = subprocess.run([sys.executable, "-m", "benchmarks", *words, "--out", str(tmp_path)], cwd=race.ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / f"{words[0]}.json").read_text())


@pytest.fixture(scope="session")
def first_race(tmp_path_factory):
    """The first race of a suite against the floor, for all that is asked of it."""
    return functools.cache(lambda name: run(tmp_path_factory.mktemp(name), name, "--against", "floor", "--rounds", "3"))


@pytest.mark.slow
@pytest.mark.fresh_compile
def test_a_small_race(first_race):
    shown, found = first_race("mlp")
    measured = found["race"]
    assert set(measured["rounds"][0]) == {"floor", "floor again", "sapwood", "sapwood-step"}
    assert len(measured["rounds"]) == 3
    assert all(0 < x["step"] < 60 for r in measured["rounds"] for x in r.values())
    assert measured["losses"]["floor"] == measured["losses"]["floor again"]
    assert len(measured["losses"]["sapwood"]) == 10
    assert found["machine"]["versions"]["jax"]
    assert "A/A" in shown
    assert "at most 0.6:" in shown


@pytest.mark.slow
@pytest.mark.fresh_compile
@pytest.mark.parametrize(("name", "limit"), [("mlp", 1.25), ("gpt", 1.10)])
def test_fit_stays_near_the_floor(name, limit, first_race, tmp_path):
    """A guard with generous margins: that what a training step costs does not grow unseen.

    Where something else had the machine in all three rounds, a race says nothing about Sapwood: what is slow loses
    three races in a row.
    """
    lost = []
    for again in range(3):
        race_again = (name, "--against", "floor", "--rounds", "3")
        _, found = run(tmp_path, *race_again) if again else first_race(name)
        measured = found["race"]["rounds"]
        low, most = ratio(measured, "sapwood", "floor", "step").low, limit + noise(suites(name)[0], measured, "step")
        if low <= most:
            return
        lost.append((low, most))
    raise AssertionError(lost)

"""`.ci/times` adds up where the check's time went, and fails where it is too much."""

import subprocess
import sys

import pytest

REPORT = """<testsuites><testsuite time="{took}">
<testcase classname="tests.layers.test_dense" name="test_a" time="3.5"/>
<testcase classname="tests.layers.test_dense" name="test_b[1]" time="0.5"/>
<testcase classname="tests.train.test_loop" name="test_c" time="2.5">
<properties><property name="costs" value="it trains"/></properties></testcase>
<testcase classname="tests.test_errors" name="test_d" time="0.1"/>
</testsuite></testsuites>"""


@pytest.fixture
def times(root, tmp_path):
    def run(took, whole, slowness):
        (tmp_path / "plain.xml").write_text(REPORT.format(took=took))
        (tmp_path / "stages").write_text(f"{whole} README: pip and pytest\n0 nothing\n")
        words = [str(root / ".ci" / "times"), str(tmp_path / "stages"), str(slowness), str(tmp_path / "plain.xml")]
        return subprocess.run([sys.executable, "-S", *words], capture_output=True, text=True)

    return run


def test_it_lists_stages_rooms_and_tests(times):
    done = times(took=100, whole=1000, slowness=1.0)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["1000", "s", "README:", "pip", "and", "pytest"] in lines
    assert ["4", "s", "2", "tests", "layers"] in lines
    assert ["0", "s", "1", "tests", "(top)"] in lines
    seconds = [float(line[0]) for line in lines[lines.index(["The", "20", "slowest"]) + 1 :][:4]]
    assert seconds == [3.5, 2.5, 0.5, 0.1]


def test_a_long_plain_test_says_why(times):
    said = times(took=100, whole=1000, slowness=0.5).stdout.partition("do not say why")[2]
    assert "test_a" in said
    assert "test_c" not in said  # it says why
    assert "do not say why" not in times(took=100, whole=1000, slowness=2.0).stdout


@pytest.mark.parametrize(
    ("took", "whole", "slowness", "over"),
    [
        (480, 2100, 1.0, []),
        (481, 2100, 1.0, ["the plain tests took 481 s, 480 s are allowed"]),
        (481, 2101, 0.5, ["the plain tests took 481 s, 480 s", "the whole took 2101 s, 2100 s"]),  # no less when faster
        (700, 3000, 1.5, []),
        (730, 3000, 1.5, ["the plain tests took 730 s, 720 s"]),
    ],
)
def test_the_budget_grows_with_a_slower_machine(times, took, whole, slowness, over):
    done = times(took, whole, slowness)
    assert done.returncode == bool(over)
    assert done.stderr.count("error:") == len(over)
    assert all(part in done.stderr for part in over)


def test_the_speed_of_the_machine_is_one_number(root):
    done = subprocess.run(
        [sys.executable, "-S", str(root / ".ci" / "speed")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) > 0

"""The picture of a run: which panels it has, what is on them, and that odd logs are drawn too."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from sapwood.train.record import curves

BLUE, ORANGE, GREEN = (
    tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in (curves.BLUE, curves.ORANGE, curves.GREEN)
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pixels(picture):
    from PIL import Image

    return np.asarray(Image.open(picture).convert("RGB"))


def has(picture, color):
    return bool((pixels(picture) == color).all(-1).any())


def run(steps=60):
    for step in range(1, steps + 1):
        row = {"step": step, "epoch": 1, "loss": 1 / step, "accuracy": 1 - 1 / step, "steps_per_second": 7.0}
        if step % 20 == 0:
            row |= {"validation_loss": 1.5 / step, "validation_accuracy": 0.9 - 1 / step}
        yield row | {"learning_rate": 1e-3 * step / steps}


def test_a_run(tmp_path):
    picture = curves.draw(write(tmp_path / "metrics.jsonl", run()), title="a run")
    assert picture == tmp_path / "curves.png"
    assert all(has(picture, color) for color in (BLUE, ORANGE, GREEN))
    height, width = pixels(picture).shape[:2]
    assert width > 3 * height  # three panels side by side
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def fall(scale=1.0, start=0.0, names=(), steps=8, every=1):
    """Rows whose best validation lies at an end, where a label would leave its panel."""
    for i in range(1, steps + 1):
        row = {"step": i * every, "loss": start + scale / i, "validation_loss": start + 1.2 * scale / i}
        for name in names:
            row |= {name: 1 - 0.5 / i, f"validation_{name}": 1 - 0.6 / i}
        yield row | {"learning_rate": 3e-4 * (1 - i / 20)}


WIDE = ("mean_absolute_percentage_error_of_the_wide_target", "WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW", "recall")


@pytest.mark.parametrize(
    ("rows", "title"),
    [
        (fall(names=WIDE, every=15630), "a run whose name goes on " * 9),
        (fall(scale=1e-7, start=1e-6, steps=1), ""),
        (fall(scale=30, start=123456789.0, every=10**6), "x"),
        (fall(scale=-1e9, steps=60), "x"),
    ],
    ids=["long names", "small", "large", "many"],
)
def test_no_text_meets_another(rows, title):
    """By the boxes that Matplotlib itself gives them: of all texts that are drawn, and of the lines."""
    series = curves._series("".join(json.dumps(row) + "\n" for row in rows))
    figure = curves._figure(series, curves._panels(series), title)
    figure.canvas.draw()
    texts = set(figure.findobj(lambda a: hasattr(a, "get_text") and a.get_visible() and a.get_text()))
    ticks = [t for a in figure.axes for line in (a.xaxis, a.yaxis) for t in line.get_major_ticks()]
    texts -= {t.label2 for t in ticks}
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    assert len(boxes) > 5
    for i, (text, box) in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
        assert [other for other, there in boxes[:i] if box.overlaps(there)] == [], text
        assert not [a for a in figure.axes if a.axison and a.bbox.padded(-2).overlaps(box)], text
    for axis in figure.axes:
        labels = [t.get_text() for t in axis.get_yticklabels()]
        assert len(set(labels)) == len(labels)


def test_panels():
    series = curves._series("".join(json.dumps(row) + "\n" for row in run()))
    assert curves._panels(series) == ["loss", "accuracy", "learning_rate"]
    assert series["validation_loss"] == ([20, 40, 60], [0.075, 0.0375, 0.025])
    many = {"learning_rate": ([], []), "loss": ([], [])} | {f"m{i}": ([], []) for i in range(9)}
    assert curves._panels(many) == ["loss", "m0", "m1", "m2", "m3", "learning_rate"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 0.5}],
        [{"step": i, "loss": "NaN"} for i in range(3)],
        [{"step": i, "loss": math.nan if i > 3 else 1.0, "validation_loss": math.inf} for i in range(70)],
        [{"step": i, "loss": -1.0, "x": 0, "y": 1e-9, "z": 1e9, "w": i, "learning_rate": 0.0} for i in range(5)],
        [{"step": 5, "validation_loss": 0.5}],
        [{"loss": 0.5}, {"step": None, "loss": 0.25}, {"step": 3, "loss": 10**400}],
        [{"step": i, "lo$$s$^": 1 / i, "perplexity": 1.7e308 if i > 2 else 1.0} for i in range(1, 5)],
    ],
)
def test_odd_logs(tmp_path, rows):
    path = write(tmp_path / "metrics.jsonl", rows)
    if all(row["loss"] == "NaN" for row in rows if "loss" in row) and "loss" in rows[0]:
        with pytest.raises(ValueError, match="no rows with numbers"):
            curves.draw(path)
    else:
        assert pixels(curves.draw(path)).std() > 0


def test_rows_of_nan_leave_a_gap_and_lines_that_are_no_rows_are_passed_over():
    rows = [{"step": 1, "loss": 1.0, "x": "NaN"}, [2], 7, {"step": 2, "loss": "NaN"}, {"step": 3, "loss": "-Infinity"}]
    series = curves._series("".join(json.dumps(row) + "\n" for row in rows))
    assert list(series) == ["loss"]
    steps, values = series["loss"]
    assert steps == [1, 2, 3]
    np.testing.assert_array_equal(values, [1.0, np.nan, -np.inf])


def test_a_title_is_no_formula(tmp_path):
    assert pixels(curves.draw(write(tmp_path / "metrics.jsonl", run(3)), title="a$b_$^{c")).std() > 0


def test_a_log_that_is_being_written(tmp_path):
    path = write(tmp_path / "metrics.jsonl", run())
    path.write_text(path.read_text() + '{"step": 61, "lo')
    assert curves.draw(path, tmp_path / "other.png").name == "other.png"
    with pytest.raises(FileNotFoundError):
        curves.draw(tmp_path / "nothing.jsonl")


def test_the_running_mean_passes_over_nan_and_starts_at_the_first_value():
    assert curves._smooth([2.0, math.nan, 4.0], 2.0) == [2.0, 2.0, pytest.approx(10 / 3)]
    assert math.isnan(curves._smooth([math.nan], 4.0)[0])


def test_in_a_process_of_its_own(tmp_path):
    process = curves.start(write(tmp_path / "metrics.jsonl", run()), "a run")
    _, errors = process.communicate(timeout=1200)
    assert (process.returncode, errors) == (0, b"")
    assert has(tmp_path / "curves.png", ORANGE)


def test_it_loads_neither_jax_nor_pyplot(tmp_path):
    path = write(tmp_path / "metrics.jsonl", run())
    code = (
        "import runpy, sys; sys.argv = ['', sys.argv[2], '']; runpy.run_path(sys.orig_argv[-2], run_name='__main__');"
    )
    code += "print([m for m in ('jax', 'matplotlib.pyplot', 'pyparsing', 'sapwood') if m in sys.modules])"
    command = [sys.executable, "-P", "-c", code, curves.__file__, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "jax" not in out
    assert "pyplot" not in out

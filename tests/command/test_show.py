"""`sapwood summary` and `sapwood graph`."""

from pathlib import Path
from xml.etree import ElementTree

import pytest


def test_summary_names_every_layer_and_counts(sapwood, stripes):
    done = sapwood("summary", stripes, "--hidden", 12)
    assert (done.code, done.err) == (0, [])
    text = "\n".join(done.out)
    # 16 * 12 + 12 + 12 * 2 + 2 parameters
    for word in ("hidden", "logits", "Dense", "float32[16,12]", "230 parameters"):
        assert word in text


def test_numbers_are_whole_where_there_is_no_terminal(sapwood, stripes):
    """A pipe has no width; the table of a wide model was cut to 80 columns, digits of its numbers included."""
    done = sapwood("summary", stripes, "--hidden", 123_456_789, "--batch-size", 1000)
    row = next(line for line in done.out if line.startswith("hidden"))
    assert "2,098,765,413" in row  # 17 * 123,456,789
    assert "float32[1000,123456789]" in row


@pytest.mark.parametrize(("command", "out"), [("summary", None), ("graph", "x.svg")])
def test_the_precision_of_the_recipe_is_shown(sapwood, stripes, command, out):
    for policy, said in (("float32", False), ("bfloat16", True)):
        done = sapwood(command, stripes, "--policy", policy, *(("--out", out) if out else ()))
        text = Path(out).read_text() if out else "\n".join(done.out)
        assert ("bfloat16[16,8]" in text) == said
    assert "a precision must be a floating dtype" in sapwood(command, stripes, "--policy", "x").error


@pytest.mark.parametrize("command", ["summary", "graph"])
def test_a_model_that_takes_what_the_data_lacks(sapwood, stripes, command):
    stripes.write_text(stripes.read_text().replace('{"image": image', '{"images": image'))
    error = sapwood(command, stripes).error
    assert "has no entry 'image', which its model takes; did you mean 'images'" in error
    assert "(it has images, label)" in error


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_graph_draws_by_layer_path(sapwood, stripes, suffix):
    done = sapwood("graph", stripes, "--out", f"x.{suffix}")
    assert (done.code, done.out, done.err) == (0, [f"x.{suffix}"], [])
    text = Path(f"x.{suffix}").read_text()
    assert "hidden" in text
    assert "logits" in text
    if suffix == "svg":
        assert ElementTree.fromstring(text).tag.endswith("svg")


def test_graph_is_named_after_the_recipe(sapwood, stripes):
    assert sapwood("graph", stripes).out == ["stripes.html"]
    assert "<" in Path("stripes.html").read_text()


def test_a_picture_that_cannot_be_written(sapwood, stripes):
    assert sapwood("graph", stripes, "--out", "no/such/x.svg").error == "no/such/x.svg: No such file or directory"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits", "digits-mlp", "text"])
def test_of_each_recipe(sapwood, tmp_path, recipe):
    done = sapwood("summary", recipe)
    assert done.code == 0, done.err
    assert any("logits" in line for line in done.out)
    done = sapwood("graph", recipe, "--out", "x.svg")
    assert done.code == 0, done.err
    ElementTree.parse(tmp_path / "x.svg")

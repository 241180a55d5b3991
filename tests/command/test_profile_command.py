"""`sapwood profile`."""

from pathlib import Path

import pytest


def test_profile_prints_a_table_and_writes_a_page(sapwood, stripes):
    done = sapwood("profile", stripes, "--steps", 3)
    assert (done.code, done.err) == (0, [])
    assert done.out[0] == "page profile-stripes/profile.html"
    assert done.out[1].startswith("trace profile-stripes ")
    assert {"hidden", "logits", "(optimizer)"} <= {line.split("  ")[0] for line in done.out}
    assert done.out[-1].startswith("total ")
    assert done.out[-1].endswith("3 steps")
    assert "hidden" in Path("profile-stripes/profile.html").read_text()
    assert len(list(Path("profile-stripes").rglob("*.xplane.pb"))) == 1


def test_a_page_of_ones_own_and_few_levels(sapwood, stripes):
    done = sapwood("profile", stripes, "--steps", 1, "--out", "x.html", "--levels", 1)
    assert (done.code, done.out[0]) == (0, "page x.html")
    assert Path("x.html").read_text().startswith("<!DOCTYPE html>")
    assert list(Path("x-trace").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such"], "there is no recipe 'no-such'"),
        (["digits", "--steps", "0"], "steps=0"),
        (["digits", "--levels", "0"], "--levels"),
        (["digits", "--eager"], "there is no option '--eager'"),
        (["digits", "--rules", "fsdp"], "--rules needs --mesh"),
        (["digits", "--out", "no.txt/such/x.html"], "no.txt/such/x-trace: Not a directory"),
    ],
)
def test_mistakes_are_one_line(sapwood, words, said):
    Path("no.txt").touch()
    assert said in sapwood("profile", *words).error


def test_a_recipe_that_runs_eagerly(sapwood, stripes):
    text = stripes.read_text() + "\n    def trainer(self, steps, **options):\n"
    stripes.write_text(text + "        return super().trainer(steps, **{**options, 'jit': False})\n")
    assert "jit=False" in sapwood("profile", stripes).error
    assert not Path("profile-stripes").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits", "digits-mlp", "text"])
def test_of_each_recipe(sapwood, recipe):
    done = sapwood("profile", recipe, "--steps", 1)
    assert done.code == 0, done.err
    assert any(line.startswith("logits") for line in done.out)
    assert max(map(len, done.out)) <= 100

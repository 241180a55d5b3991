"""Which path of a file goes to which path of a model."""

import pytest

from sapwood.core import paths
from sapwood.core.errors import ConfigError
from sapwood.saving.match_paths import Report, match

THERE = ["backbone/0/w", "backbone/0/b", "backbone/1/w", "head/w", "step"]


@pytest.mark.parametrize(
    ("here", "patterns", "expected"),
    [
        (["head/w", "head/b"], None, {"head/w": "head/w"}),
        (["e/0/w", "e/0/b"], {"backbone/**": "e/**"}, {"e/0/w": "backbone/0/w", "e/0/b": "backbone/0/b"}),
        (["w/0", "w/1", "head/w"], {"backbone/*/w": "w/*"}, {"w/0": "backbone/0/w", "w/1": "backbone/1/w"}),
        (["a/0/x/w"], {"backbone/?/*": "a/?/x/*"}, {"a/0/x/w": "backbone/0/w"}),
        (["head/w", "backbone/1/w"], {"head/**": None, "**": "**"}, {"backbone/1/w": "backbone/1/w"}),
        (["x/head/w"], {"**/w": "x/**/w"}, {"x/head/w": "head/w"}),
        (["x"], {"step": "x"}, {"x": "step"}),
        (["x/step"], {"**/step": "x/**/step"}, {"x/step": "step"}),  # `**` may be no name at all
        (
            ["y/w", "y/0/w"],
            {"head/**/w": "y/**/w", "backbone/**/w": "y/**/w"},
            {"y/w": "head/w", "y/0/w": "backbone/0/w"},
        ),
        (["n"], {"step/**": "n/**"}, {"n": "step"}),
        (["a.b+c"], {"step": "a.b+c"}, {"a.b+c": "step"}),
    ],
)
def test_pairs(here, patterns, expected):
    assert match(THERE, here, patterns) == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"bakbone/**": "e/**"}, r"nothing in the file fits 'bakbone/\*\*'; did you mean 'backbone/\*\*'.*; it has"),
        ({"backbone/**": "f/**"}, r"'backbone/\*\*' leads to 'f/\*\*', which the model has not.*it has e/\*\*"),
        ({"backbone/**": "e/*"}, "must have the same wildcards"),
        ({"*/*": "e/**"}, "must have the same wildcards"),
        (
            {"backbone/**": "e/**", "backbone/0/w": None},
            "'backbone/0/w' does nothing.*'backbone/\\*\\*' comes before it",
        ),
        ({"backbone/0/w": "e/0/w", "backbone/1/w": "e/0/w"}, "leads both backbone/0/w and backbone/1/w to e/0/w"),
    ],
)
def test_a_match_that_cannot_be_meant(patterns, message):
    with pytest.raises(ConfigError, match=message):
        match(THERE, ["e/0/w"], patterns)


def test_the_wildcards_fit_what_they_fit_everywhere():
    """One language of patterns: `paths.matches` says the same, which `Trainer(trainable=)` asks."""
    for pattern in ("**", "**/w", "backbone/**", "backbone/**/w", "*/w", "head/?", "backbone/*/*", "b**/0/w", "s?ep"):
        fitting = {path for path in THERE if paths.matches(pattern, path)}
        assert set(match(THERE, THERE, {pattern: pattern}).values()) == fitting, pattern


def test_without_patterns_nothing_has_to_fit():
    assert match(THERE, ["other"], None) == {}


def test_the_report_reads_well():
    report = Report({"a/w": "a/w", "b/w": "c/w"}, ("head/w",), tuple(f"x/{i}" for i in range(12)))
    assert repr(report) == (
        "loaded 2 of 3 arrays, 1 of them from another path\n"
        "  fresh: head/w\n"
        "  unused: x/0, x/1, x/2, x/3, x/4, x/5, x/6, x/7, and 4 more"
    )
    assert repr(Report({"w": "w"}, (), ())) == "loaded 1 of 1 arrays"

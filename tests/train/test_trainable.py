"""What trains, by path pattern."""

import pytest

from sapwood import ConfigError
from sapwood.train.trainable import check, join, split

PARAMS = {"stem": {"kernel": 1, "bias": 2}, "blocks": {"0": {"up": {"kernel": 3}}, "1": {"up": {"kernel": 4}}}}


def flat(tree):
    return (
        sorted(tree.values())
        if not any(isinstance(x, dict) for x in tree.values())
        else sorted(leaf for x in tree.values() for leaf in (flat(x) if isinstance(x, dict) else [x]))
    )


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("stem", [1, 2]),
        ("**/bias", [2]),
        ("blocks/1", [4]),
        ("blocks/*/up/kernel", [3, 4]),
        (("stem/bias", "blocks/0"), [2, 3]),
        ("!stem", [3, 4]),
        (("!blocks", "blocks/1", "!**/bias"), [1, 4]),
        (lambda path: path.endswith("kernel"), [1, 3, 4]),
    ],
)
def test_split_and_join(patterns, expected):
    check(PARAMS, patterns)
    trained, frozen = split(PARAMS, patterns)
    assert flat(trained) == expected
    assert sorted(flat(trained) + flat(frozen)) == [1, 2, 3, 4]
    assert join(trained, frozen) == PARAMS


def test_none_is_everything():
    assert split(PARAMS, None) == (PARAMS, {})


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(ConfigError, match="trainable='stemm' matches no parameter; did you mean 'stem'"):
        check(PARAMS, "stemm")
    with pytest.raises(ConfigError, match="'!head' matches no parameter"):
        check(PARAMS, ("!stem", "!head"))


def test_nothing_left_to_train_is_an_error():
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        check(PARAMS, ("!stem", "!blocks"))

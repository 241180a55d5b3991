"""What trains, by path pattern."""

import jax
import numpy as np
import optax
import pytest

import sapwood as sw
from sapwood import ConfigError
from sapwood import layers as L
from sapwood.train.state.trainable import check, join, split

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
        (("!**/bias", "blocks/1", "!blocks", "**"), [1, 4]),
        (("!stem/**", "**"), [3, 4]),
        (("!stem/bias", "stem"), [1]),
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


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("**", "!stem/**"), r"'!stem/\*\*' does nothing, .* '\*\*' comes before it; put '!stem/\*\*' first"),
        (("stem/bias", "stem/kernel", "stem"), "'stem' does nothing, .* and 'stem/bias' comes before it"),
    ],
)
def test_a_pattern_that_an_earlier_one_covers_is_an_error(patterns, message):
    with pytest.raises(ConfigError, match=message):
        check(PARAMS, patterns)


@pytest.mark.parametrize("patterns", [("!stem", ...), {"stem"}, 3, ("stem", None)])
def test_what_is_no_pattern_says_what_is_expected(patterns):
    with pytest.raises(ConfigError, match="the first that fits decides, or a function of the path is expected"):
        sw.Trainer(lambda v, batch: (0.0, {}), optax.sgd(0.1), trainable=patterns)


def test_nothing_left_to_train_is_an_error():
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        check(PARAMS, ("!stem", "!blocks"))


@sw.layer
def counting(v, x):
    """A layer of a user's own that counts its batches, and asks nobody whether it is frozen."""
    n = v.state("n", (), jax.nn.initializers.zeros)
    v.put(n=n + 1)
    return x * v.param("scale", (), jax.nn.initializers.ones)


def _subsets(n):
    return [[i for i in range(n) if bits >> i & 1] for bits in range(2**n)]


@pytest.mark.costs("compiles a training step")
def test_a_frozen_layer_keeps_its_state_and_its_batch_norm_runs_as_in_evaluation():
    """As `trainable=False` in Keras does, by its formula in NumPy: dropout is not concerned."""
    seen = []

    def encoder(v, x):
        x = counting(v.count, L.BatchNorm()(v.norm, x))
        return L.Dropout(0.5)(v.drop, L.Remat(L.BatchNorm(scale=False, bias=False))(v.bare, x))

    def network(v, x):
        seen[:] = map(sw.frozen, (v, v.head, v.drop, v.encoder, v.encoder.drop, v.encoder.bare))
        return L.Dense(1)(v.head, counting(v.count, L.BatchNorm()(v.norm, encoder(v.encoder, x))))

    x = np.random.default_rng(0).normal(5.0, 2.0, (6, 3)).astype("float32")
    batch = {"x": x, "label": np.zeros((6, 1), "float32")}
    objective = sw.supervised(network, "squared_error", (), inputs="x")
    trainer = sw.Trainer(objective, optax.sgd(0.1), trainable=("!encoder", "**"))
    params, state = sw.init(objective, 0, batch)
    running = {"mean": np.float32([1, 2, 3]), "var": np.float32([4, 1, 9])}
    state["encoder"] |= {"norm": running, "bare": running}
    first = trainer.init(0, batch, params, jax.tree.map(np.asarray, state))
    after, _ = jax.jit(trainer.step)(first, batch)
    assert seen == [False, False, False, True, True, True]
    jax.tree.map(np.testing.assert_array_equal, after.state["encoder"], first.state["encoder"])
    assert float(after.state["count"]["n"]) == 1
    # What reaches the norm that trains: the encoder by its running statistics, with half of the features dropped.
    for _ in range(2):
        x = (x - running["mean"]) / np.sqrt(running["var"] + 1e-5)
    total = (np.asarray(after.state["norm"]["mean"]) - 0.9 * np.asarray(first.state["norm"]["mean"])) / 0.1 * 6 / 2
    sums = np.array([[column[rows].sum() for rows in _subsets(6)] for column in x.T])
    assert np.abs(sums - total[:, None]).min(1).max() < 1e-3
    assert np.abs(x.sum(0) - total).max() > 1e-3

from collections import Counter

import numpy as np
import pytest

from sapwood.core.errors import ConfigError, DataError
from sapwood.data import batches, load
from sapwood.data.shuffle import Order


def numbers(count):
    return load({"x": np.arange(count)})


def stream(count, batch_size, **options):
    return batches(numbers(count), batch_size, **{"process_index": 0, "process_count": 1, **options})


def xs(found):
    return [b["x"].tolist() for b in found]


# the order


@pytest.mark.parametrize("count", [1, 2, 10, 1437])
def test_each_pass_is_a_permutation_of_its_own(count):
    order = Order(count, seed=3, shuffle=True)
    passes = [order(np.arange(p * count, (p + 1) * count)).tolist() for p in range(4)]
    assert all(sorted(p) == list(range(count)) for p in passes)
    if count > 2:
        assert len({tuple(p) for p in passes}) == 4


def test_any_position_is_found_without_walking_there():
    walked = Order(100, seed=1, shuffle=True)
    whole = np.concatenate([walked(np.arange(s, s + 37)) for s in range(0, 37 * 300, 37)])
    for place in (0, 99, 100, 9999, 11000):
        assert Order(100, seed=1, shuffle=True)(np.array([place])) == whole[place]


def test_seeds_share_no_pass():
    """Were the seed of pass e simply seed + e, seed 0 and seed 1 would see the same permutations, one pass apart."""
    seen = Counter()
    for seed in range(5):
        order = Order(50, seed, shuffle=True)
        seen.update(tuple(order(np.arange(p * 50, (p + 1) * 50)).tolist()) for p in range(5))
    assert max(seen.values()) == 1


def test_large_data_is_shuffled_by_grain_without_a_permutation_in_memory(monkeypatch):
    import grain

    monkeypatch.setattr("sapwood.data.shuffle.WHOLE", 50)
    order = Order(97, seed=5, shuffle=True)
    found = order(np.arange(97 * 2))
    theirs = grain.MapDataset.range(97).seed(5).shuffle()
    assert found.tolist() == [theirs[i] for i in range(97 * 2)]
    assert sorted(found[:97].tolist()) == sorted(found[97:].tolist()) == list(range(97))
    assert found[:97].tolist() != found[97:].tolist()
    assert order._passes == {}


def test_the_order_of_a_seed_never_changes():
    assert xs([stream(10, 10, seed=0)[0]]) == [[3, 7, 6, 4, 1, 0, 2, 8, 5, 9]]


def test_shuffling_is_even():
    """Each example stands at each place about equally often (chi-square, 99.9 % bound for 36 degrees of freedom)."""
    order = Order(7, seed=0, shuffle=True)
    passes = order(np.arange(7 * 700)).reshape(700, 7)
    table = np.stack([np.bincount(passes[:, place], minlength=7) for place in range(7)])
    assert ((table - 100) ** 2 / 100).sum() < 68


# the remainder


def test_wrap_goes_on_into_the_next_pass():
    assert xs(stream(5, 2, shuffle=False, epochs=2)) == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4], [0, 1]]
    shuffled = np.concatenate(xs(stream(5, 2, seed=3, epochs=5)))
    assert len(shuffled) == 30
    assert all(sorted(shuffled[p * 5 : p * 5 + 5]) == list(range(5)) for p in range(6))


def test_drop_leaves_out_another_rest_each_pass():
    found = [b["x"] for b in stream(11, 4, seed=0, epochs=20, remainder="drop")]
    assert len(found) == 40
    rests = []
    for p in range(20):
        seen = np.concatenate(found[2 * p : 2 * p + 2])
        assert len(set(seen.tolist())) == 8
        rests.append(frozenset(range(11)) - set(seen.tolist()))
    assert len(set(rests)) > 10


def test_pad_masks_what_fills_up_and_counts_each_example_once():
    found = list(stream(7, 3, shuffle=False, epochs=2, remainder="pad"))
    assert xs(found) == [[0, 1, 2], [3, 4, 5], [6, 6, 6]] * 2
    assert [b["mask"].tolist() for b in found[:3]] == [[True] * 3, [True] * 3, [True, False, False]]
    shuffled = list(stream(7, 3, seed=1, epochs=1, remainder="pad"))
    assert sorted(np.concatenate([b["x"][b["mask"]] for b in shuffled]).tolist()) == list(range(7))


@pytest.mark.parametrize("dtype", ["bool", "int32", "float32"])
def test_pad_keeps_a_mask_of_the_data(dtype):
    own = np.array([[1, 1], [1, 0], [1, 0]], dtype)
    found = list(batches(load({"x": np.arange(3), "mask": own}), 2, shuffle=False, epochs=1, remainder="pad"))
    assert [b["mask"].tolist() for b in found] == [[[1, 1], [1, 0]], [[1, 0], [0, 0]]]
    assert all(b["mask"].dtype == dtype for b in found)


@pytest.mark.parametrize("remainder", ["wrap", "drop", "pad"])
@pytest.mark.parametrize(("count", "size"), [(12, 4), (4, 4), (12, 1)])
def test_what_divides_is_the_same_every_way(remainder, count, size):
    found = stream(count, size, seed=2, epochs=3, remainder=remainder)
    assert xs(found) == xs(stream(count, size, seed=2, epochs=3))
    assert found.steps_per_epoch == count // size


def test_a_batch_larger_than_the_data():
    assert xs(stream(3, 8, shuffle=False, epochs=2)) == [[0, 1, 2, 0, 1, 2, 0, 1], [2, 0, 1, 2, 0, 1, 2, 0]]
    padded = next(stream(3, 8, shuffle=False, remainder="pad"))
    assert padded["x"].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]
    assert padded["mask"].sum() == 3
    with pytest.raises(
        ConfigError, match=r"larger than the data set of 3, .* use batch_size=3 or less, or remainder='wrap'"
    ):
        stream(3, 8, remainder="drop")


def test_counting():
    assert [stream(1437, 32, remainder=r).steps_per_epoch for r in ("wrap", "drop", "pad")] == [45, 44, 45]
    assert stream(1437, 32, epochs=10).steps == 450
    assert stream(1437, 32).steps is None
    endless = stream(5, 2)
    for _ in range(20):
        next(endless)
    assert (endless.position, endless.epoch) == (20, 6)


# position and seed


@pytest.mark.parametrize("remainder", ["wrap", "drop", "pad"])
def test_a_resumed_stream_goes_on_as_the_unbroken_one(remainder):
    whole = xs(stream(23, 4, seed=9, epochs=6, remainder=remainder))
    for stop in (0, 1, 5, 6, 11, len(whole)):
        first = stream(23, 4, seed=9, epochs=6, remainder=remainder)
        head = xs(next(first) for _ in range(stop))
        second = stream(23, 4, seed=9, epochs=6, remainder=remainder).restore(first.state())
        assert head + xs(second) == whole


def test_the_state_is_plain_integers():
    import json

    state = stream(23, 4, seed=9).seek(7).state()
    said = {"position": 7, "seed": 9, "examples": 23, "batch_size": 4, "shuffle": 1, "remainder": 0}
    assert json.loads(json.dumps(state)) == said


def test_a_state_of_other_data_is_refused():
    state = stream(23, 4, seed=9).state()
    for other, what in (((24, 4, 9), "examples 23; this has 24"), ((23, 5, 9), "batch size 4"), ((23, 4, 8), "seed 9")):
        with pytest.raises(DataError, match=what):
            stream(other[0], other[1], seed=other[2]).restore(state)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"shuffle": False}, "shuffle 1; this has 0"),
        ({"remainder": "drop"}, "remainder wrap; this has drop"),
    ],
)
def test_a_state_of_another_order_is_refused(option, message):
    state = stream(23, 4, seed=9).seek(7).state()
    with pytest.raises(DataError, match=message):
        stream(23, 4, seed=9, **option).restore(state)
    older = {name: state[name] for name in ("position", "seed", "examples", "batch_size")}
    assert stream(23, 4, seed=9, **option).restore(older).position == 7


def test_the_same_seed_gives_the_same_and_another_seed_another():
    assert xs(stream(30, 7, seed=1, epochs=2)) == xs(stream(30, 7, seed=1, epochs=2))
    assert xs(stream(30, 7, seed=1, epochs=2)) != xs(stream(30, 7, seed=2, epochs=2))


def test_a_batch_by_number_and_its_indices():
    found = stream(30, 7, seed=1)
    walked = [next(found)["x"].tolist() for _ in range(9)]
    assert found[4]["x"].tolist() == walked[4] == found.indices(4).tolist()
    assert found.position == 9
    ended = stream(30, 7, epochs=1)
    with pytest.raises(IndexError, match=r"no batch 5; batches are 0\.\.4"):
        ended[5]
    with pytest.raises(ConfigError, match=r"position 6 is outside 0\.\.5"):
        ended.seek(6)


@pytest.mark.parametrize("remainder", ["wrap", "drop", "pad"])
def test_a_block_is_several_batches(remainder):
    found = stream(23, 4, seed=9, remainder=remainder)
    block = found.block(3, 5)
    assert block["x"].shape == (5, 4)
    for i in range(5):
        for name, values in found[3 + i].items():
            np.testing.assert_array_equal(block[name][i], values)


def test_an_exhausted_stream_starts_again_after_seek():
    found = stream(5, 2, epochs=1)
    first = xs(found)
    assert list(found) == []
    assert xs(found.seek(0)) == first


# processes


@pytest.mark.parametrize("remainder", ["wrap", "drop", "pad"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_contiguous_parts_of_the_same_batches(processes, remainder):
    whole = list(stream(23, 8, seed=4, epochs=3, remainder=remainder))
    parts = [
        list(stream(23, 8, seed=4, epochs=3, remainder=remainder, process_index=p, process_count=processes))
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        for name in batch:
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


def test_a_position_holds_for_another_number_of_processes():
    whole = xs(stream(23, 8, seed=4, epochs=5))
    two = [stream(23, 8, seed=4, epochs=5, process_index=p, process_count=2) for p in range(2)]
    for part in two:
        [next(part) for _ in range(4)]
    four = [stream(23, 8, seed=4, epochs=5, process_index=p, process_count=4).restore(two[0].state()) for p in range(4)]
    joined = [np.concatenate([b["x"] for b in step]).tolist() for step in zip(*four, strict=True)]
    assert joined == whole[4:]


def test_what_does_not_divide_among_processes():
    with pytest.raises(ConfigError, match="batch of 30 does not divide among 4 processes; use 28 or 32"):
        stream(100, 30, process_index=0, process_count=4)
    with pytest.raises(ConfigError, match="batch of 3 does not divide among 4 processes; use 4"):
        stream(100, 3, process_index=0, process_count=4)
    with pytest.raises(ConfigError, match=r"process 4 of 4: the index is 0\.\.3"):
        stream(100, 32, process_index=4, process_count=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "at least one example, not 0"),
        ({"remainder": "keep"}, "remainder is one of 'wrap', 'drop', 'pad', not 'keep'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"seed": -1}, "not -1"),
        ({"dataset": [1, 2]}, "made of a data set, not of list"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        batches(**{"dataset": numbers(5), "batch_size": 2, **options})


def test_weights_come_with_the_batches():
    data = load((np.zeros(4), np.array([0, 0, 0, 1]))).weighted()
    batch = next(batches(data, 4, shuffle=False, remainder="pad"))
    assert batch["weight"].dtype == np.float32
    np.testing.assert_allclose(batch["weight"], [2 / 3, 2 / 3, 2 / 3, 2])


def test_a_bad_example_stops_the_stream_by_name_every_time():
    data = load((np.zeros(20), np.where(np.arange(20) == 17, 12, 1)), classes=10)
    found = batches(data, 5, shuffle=False).seek(3)
    for _ in range(2):
        with pytest.raises(DataError, match=r"label of example 17 is 12; classes are 0\.\.9"):
            next(found)
        assert found.position == 3

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from sapwood.core.errors import ConfigError, DataError
from sapwood.data import Feature, load


@pytest.fixture
def data():
    rng = np.random.RandomState(0)
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    return load({"x": np.arange(100), "image": rng.rand(100, 4), "label": labels})


def test_examples_slices_and_negative_indices(data):
    assert data[3]["x"] == 3
    assert data[-1]["x"] == 99
    assert [int(e["x"]) for e in data[10:16:2]] == [10, 12, 14]
    assert data[10:][::-1][0]["x"] == 99
    assert data.take(5).column("x").tolist() == [0, 1, 2, 3, 4]
    assert data.select([7, 7, 2]).gather([0, 1, -1])["x"].tolist() == [7, 7, 2]
    with pytest.raises(IndexError, match=r"no example 100; .* 0\.\.99"):
        data[100]
    with pytest.raises(DataError, match="empty"):
        data[5:5]


def test_indices_of_every_kind(data):
    many = load({"x": np.arange(1000)})
    assert many.gather(np.array([200, 3], np.uint8))["x"].tolist() == [200, 3]
    mask = np.zeros(100, bool)
    mask[[4, 9]] = True
    assert data.gather(mask)["x"].tolist() == [4, 9]
    with pytest.raises(IndexError, match=r"a mask of shape \(99,\) chooses among 100 examples; \(100,\) is expected"):
        data.select(mask[1:])
    with pytest.raises(IndexError, match=r"no example -101; .* 0\.\.99"):
        data[-101]


def test_iterating_gives_every_example_and_hides_no_error(data):
    assert [int(e["x"]) for e in data[:5]] == [0, 1, 2, 3, 4]

    def fifth_is_bad(example):
        return {"x": [example["x"]][0 if example["x"] < 5 else 1]}

    mapped = data.map(fifth_is_bad)
    with pytest.raises(IndexError, match="list index out of range"):
        list(mapped)


def test_a_slice_does_not_see_later_changes_of_order(data):
    part = data[20:30]
    assert part[2:4].column("x").tolist() == [22, 23]
    assert len(data) == 100


def test_map_keeps_what_stays_and_infers_the_rest(data):
    mapped = data.map(lambda e: {"x": e["x"], "twice": e["image"] * 2, "label": e["label"]})
    assert mapped.features["label"] == data.features["label"]
    assert mapped.features["twice"] == Feature((4,), "float32")
    np.testing.assert_array_equal(mapped[7]["twice"], data[7]["image"] * 2)
    assert "twice" not in data[7]


def test_a_batched_map_gives_the_same_as_one_by_one(data):
    one = data.map(lambda e: {"x": e["x"] + e["label"]})
    many = data.map(lambda b: {"x": b["x"] + b["label"]}, batched=True)
    np.testing.assert_array_equal(one.gather([90, 3, 75])["x"], many.gather([90, 3, 75])["x"])


def test_a_mapped_function_is_held_to_the_features(data):
    wrong = data.map(lambda b: {**b, "label": b["label"] * 5}, batched=True)
    with pytest.raises(DataError, match=r"label of example 70 is 5; classes are 0\.\.2"):
        wrong[50:].gather([0, 20, 21])
    with pytest.raises(DataError, match="gave list for example 0; a dict"):
        data.map(lambda e: [1])
    with pytest.raises(DataError, match="gave str for example 7; a dict"):
        data.map(lambda e: {"x": e["x"]} if e["x"] != 7 else "seven").gather([3, 7])
    with pytest.raises(DataError, match="gave list for 1 examples; a dict"):
        data.map(lambda b: [1], batched=True)
    with pytest.raises(DataError, match="for 1 examples"):
        data.map(lambda b: {"x": np.zeros(7)}, batched=True)


def test_bad_examples_are_found_when_first_read_and_named_as_stored():
    labels = np.zeros(50, int)
    labels[17] = 12
    data = load((np.zeros((50, 2)), labels), classes=10)
    data.gather(np.arange(10))
    for _ in range(2):  # once is not enough: a bad example stays bad
        with pytest.raises(DataError, match=r"^label of example 17 is 12; classes are 0\.\.9$"):
            data[10:].gather([5, 6, 7])


def test_check_names_entries_from_the_first_index(data):
    with pytest.raises(DataError, match="label of example 31 is 3"):
        data.check({"label": np.array([2, 3])}, first_index=30)


def test_declare_holds_examples_to_more(data):
    declared = data.declare(x=Feature((), "int32", low=0, high=50))
    assert declared[50]["x"] == 50
    with pytest.raises(DataError, match=r"x of example 51 is 51; the range is 0\.\.50"):
        declared[51]
    assert data[51]["x"] == 51
    with pytest.raises(ConfigError, match="no entry 'y'"):
        data.declare(y=Feature((), "int32"))


def test_a_split_is_disjoint_whole_stratified_and_by_seed(data):
    rest, part = data.split(0.1, seed=3)
    both = np.concatenate([rest.column("x"), part.column("x")])
    assert sorted(both.tolist()) == list(range(100))
    assert np.bincount(part.column("label")).tolist() == [7, 2, 1]
    again = data.split(0.1, seed=3)[1]
    assert part.column("x").tolist() == again.column("x").tolist()
    assert part.column("x").tolist() != data.split(0.1, seed=4)[1].column("x").tolist()


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.33, 0.999])
def test_a_split_has_the_size_asked_for(data, fraction):
    rest, part = data.split(fraction)
    assert len(part) == min(max(round(100 * fraction), 1), 99)
    assert len(rest) + len(part) == 100


def test_what_is_left_of_a_share_goes_to_the_largest_remainder(data):
    part = data.split(0.33)[1]  # 23.1, 6.6 and 3.3 of the classes
    assert np.bincount(part.column("label")).tolist() == [23, 7, 3]


def test_a_split_of_numbers_without_classes():
    data = load((np.zeros((10, 2)), np.linspace(0, 1, 10)))
    rest, part = data.split(0.3)
    assert (len(rest), len(part)) == (7, 3)


def test_the_split_of_a_seed_never_changes():
    part = load({"x": np.arange(20), "label": np.arange(20) % 2}).split(0.2, seed=0)[1]
    assert part.column("x").tolist() == [4, 7, 11, 16]


def test_a_split_that_cannot_be(data):
    with pytest.raises(ConfigError, match="between 0 and 1, not 1"):
        data.split(1.0)
    with pytest.raises(DataError, match="one example cannot be split"):
        data[:1].split(0.5)
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match=rf"a seed is an integer from 0 to 2\*\*32 - 1, not {seed}"):
            data.split(0.5, seed=seed)


def test_labels_that_are_no_scalars_are_not_stratified():
    data = {"x": np.arange(10), "label": np.arange(40).reshape(10, 4) % 3}
    train, valid = load(data, validation=0.2)
    assert (len(train), len(valid)) == (8, 2)
    with pytest.raises(ConfigError, match=r"split\(by='label'\): \(4,\) values an example; one class each"):
        load(data).split(0.2, by="label")
    with pytest.raises(ConfigError, match="'label' is not one class an example"):
        load(data).class_weights()


def test_class_weights_are_scikit_learns(data):
    labels = data.column("label")
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(data.class_weights(), expected, rtol=1e-6)
    np.testing.assert_allclose(data.weighted().gather([0, 99])["weight"], expected[[0, 2]], rtol=1e-6)
    assert load((np.zeros(3), np.array([0, 0, 2]))).class_weights().tolist() == [0.5, 0, 1]


def test_weights_by_example_and_by_class_multiply_and_follow_slices(data):
    weighted = data.weighted(np.arange(100)).weighted({2: 3})
    assert weighted[80:].gather([0, 19])["weight"].tolist() == [80, 297]
    assert weighted.features["weight"].dtype == "float32"
    mapped = weighted.map(lambda e: {"x": e["x"], "label": e["label"]})
    assert mapped[99]["weight"] == 297


def test_stored_weights_are_multiplied():
    data = load((np.zeros(3), np.array([0, 1, 1]), np.array([1, 2, 3]))).weighted({1: 10})
    assert data.gather([0, 1, 2])["weight"].tolist() == [1, 20, 30]


def test_weights_by_the_name_of_a_class():
    data = load((np.zeros(3), np.array(["cat", "dog", "cat"])))
    assert data.weighted({"dog": 4}).gather([0, 1, 2])["weight"].tolist() == [1, 4, 1]
    with pytest.raises(ConfigError, match="no class 'cow' to weigh; classes are cat, dog"):
        data.weighted({"cow": 1})


def test_a_number_that_is_the_name_of_another_class():
    data = load({"x": np.zeros(3), "label": ["1", "2", "3"]})
    with pytest.raises(ConfigError, match="1 is the number of class '2', and '1' the name of another"):
        data.weighted({1: 5, 2: 7})
    assert data.weighted({"1": 5, "2": 7}).column("weight").tolist() == [5, 7, 1]
    assert load({"label": ["0", "1", "7"]}).weighted({1: 5, 2: 3}).column("weight").tolist() == [1, 5, 3]


def test_a_label_beyond_the_classes_is_named_where_they_are_weighed():
    with pytest.raises(DataError, match=r"label of example 2 is 5; classes are 0..2"):
        load({"x": np.zeros(3), "label": np.array([0, 1, 5])}, classes=3).weighted({0: 2.0})


def test_weights_of_false_and_true():
    """NumPy takes a bool in place of an index for a mask, so True once weighed every class."""
    data = load((np.zeros(3), np.array([False, False, True])))
    for false, true in ((False, True), (np.False_, np.True_), (0, 1), ("0", "1")):
        assert data.weighted({false: 1, true: 5}).column("weight").tolist() == [1, 1, 5]
    named = load((np.zeros(3), np.array(["True", "False", "True"])))
    assert named.weighted({False: 1, True: 5}).column("weight").tolist() == [5, 1, 5]
    with pytest.raises(ConfigError, match="no class True to weigh; classes are cat, dog"):
        load((np.zeros(3), np.array(["cat", "dog", "cat"]))).weighted({True: 2})
    with pytest.raises(ConfigError, match="1 and '1' are the same class"):
        data.weighted({1: 2, "1": 3})


def test_bad_weights(data):
    with pytest.raises(DataError, match=r"shape \(3,\); \(100,\) is expected"):
        data.weighted([1, 2, 3])
    with pytest.raises(DataError, match=r"weight of example 4 is -1"):
        data.weighted(np.where(np.arange(100) == 4, -1, 1))
    with pytest.raises(ConfigError, match="'even'"):
        data.weighted("even")


def test_weights_are_an_entry_like_the_others(data):
    weighted = data.weighted(np.arange(100))
    assert weighted[90:].column("weight").tolist() == list(range(90, 100))
    stored = load((np.zeros(3), np.array([0, 1, 1]), np.array([1, 2, 3]))).weighted({1: 10})
    assert stored[1:].column("weight").tolist() == [20, 30]
    with pytest.raises(ConfigError, match="no entry 'weight'"):
        data.column("weight")


def test_more_can_be_declared_of_weighted_data(data):
    declared = data.weighted(np.arange(100)).declare(x=Feature((), "int32", high=50))
    assert declared[50]["weight"] == 50
    with pytest.raises(DataError, match=r"x of example 51 is 51; the range is \.\.50"):
        declared[51]


def test_map_keeps_the_feature_of_weights(data):
    kept = data.weighted(np.arange(100)).map(lambda e: {"x": e["x"]})
    assert list(kept.features) == ["x", "weight"]
    assert kept.map(lambda e: {"twice": e["x"] * 2})[9] == {"twice": 18, "weight": 9}
    assert kept.column("weight").tolist() == list(range(100))
    after = data.map(lambda e: {"label": e["label"]}).weighted({2: 3})
    assert after.gather([0, 99])["weight"].tolist() == [1, 3]

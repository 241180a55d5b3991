import ml_dtypes
import numpy as np
import pytest

from sapwood.core.errors import ConfigError, DataError
from sapwood.data import Feature
from sapwood.data.check import check, even, stack
from sapwood.data.feature import cast, infer, to_device_dtype


def said(features, batch, entries=None):
    with pytest.raises(DataError) as error:
        check(features, batch, range(len(next(iter(batch.values())))) if entries is None else entries)
    return str(error.value)


def test_a_label_outside_the_classes_names_the_example():
    feature = {"label": Feature((), "int32", num_classes=10)}
    check(feature, {"label": np.array([0, 9])}, [0, 1])
    assert said(feature, {"label": np.array([3, 12])}, [16, 17]) == "label of example 17 is 12; classes are 0..9"
    assert said(feature, {"label": np.array([-1])}) == "label of example 0 is -1; classes are 0..9"


def test_more_wrong_examples_are_counted():
    feature = {"label": Feature((), "int32", num_classes=2)}
    assert said(feature, {"label": np.array([0, 5, 6, 7])}).endswith("(and 2 more like it in this batch)")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_not_finite_is_named_with_its_place(bad, dtype):
    values = np.zeros((3, 2, 2), dtype)
    values[1, 0, 1] = bad
    message = said({"image": Feature((2, 2), np.dtype(dtype).name)}, {"image": values}, [5, 6, 7])
    assert message.startswith(f"image of example 6 is {bad} at (0, 1); finite")
    check({"image": Feature((2, 2), np.dtype(dtype).name, finite=False)}, {"image": values}, [5, 6, 7])


def test_ranges_include_both_ends():
    feature = {"image": Feature((2,), "uint8", low=1, high=16)}
    check(feature, {"image": np.array([[1, 16]], np.uint8)}, [0])
    assert (
        said(feature, {"image": np.array([[1, 17]], np.uint8)}) == "image of example 0 is 17 at 1; the range is 1..16"
    )
    assert "is 0 at 0; the range is 1..16" in said(feature, {"image": np.array([[0, 3]], np.uint8)})


def test_a_token_outside_the_vocabulary():
    feature = {"tokens": Feature((3,), "int32", vocabulary=tuple("abc"))}
    message = said(feature, {"tokens": np.array([[0, 1, 2], [0, 3, 0]])})
    assert message == "tokens of example 1 is 3 at 1; the vocabulary has ids 0..2"


def test_a_column_is_named():
    feature = {"features": Feature((2,), "float32", columns=("age", "height"))}
    assert said(feature, {"features": np.array([[1, np.nan]])}).startswith(
        "features column 'height' of example 0 is nan"
    )


def test_rank_and_shape():
    feature = {"image": Feature((None, None, 3), "uint8")}
    check(feature, {"image": np.zeros((1, 5, 4, 3), np.uint8)}, [0])
    assert "has shape (5, 4); (None, None, 3) was expected" in said(feature, {"image": np.zeros((1, 5, 4), np.uint8)})
    assert "has shape (5, 4, 1)" in said(feature, {"image": np.zeros((1, 5, 4, 1), np.uint8)})


def test_an_entry_that_is_missing():
    assert said({"label": Feature((), "int32")}, {"image": np.zeros(2)}) == (
        "label is declared, but the examples have only 'image'"
    )


def test_examples_of_several_shapes_are_checked_one_by_one():
    batch = stack([{"x": np.zeros(2)}, {"x": np.array([0, 1, np.inf])}], [4, 5], "example {}".format)
    assert said({"x": Feature((None,), "float32")}, batch, [4, 5]).startswith("x of example 5 is inf at 2; finite")


def test_features_survive_json():
    import json

    for feature in (
        Feature((8, 8, 1), "uint8", low=0, high=16),
        Feature((), "int32", classes=("cat", "dog")),
        Feature((None,), "int32", vocabulary=("a", "b"), finite=False),
        Feature((2,), "float32", columns=("x", "y")),
    ):
        assert Feature.from_json(json.loads(json.dumps(feature.to_json()))) == feature


def test_numbers_of_numpy_survive_json():
    import json

    numbers = {"num_classes": np.int64(3), "low": np.float32(0.5), "high": np.int32(2)}
    feature = Feature((np.int64(4),), "int32", **numbers)
    assert feature == Feature((4,), "int32", num_classes=3, low=0.5, high=2)
    assert Feature.from_json(json.loads(json.dumps(feature.to_json()))) == feature


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match="num_classes is 3, but 2 classes"):
        Feature((), "int32", classes=("a", "b"), num_classes=3)
    with pytest.raises(ConfigError, match="'flot32' is no dtype"):
        Feature((), "flot32")


def test_scale():
    import jax.numpy as jnp

    feature = Feature((2,), "uint8", low=0, high=16)
    np.testing.assert_array_equal(feature.scale(np.array([4, 16], np.uint8)), np.array([0.25, 1], np.float32))
    np.testing.assert_array_equal(feature.scale(jnp.array([4, 16], jnp.uint8)), np.array([0.25, 1], np.float32))
    assert Feature((), "uint8").scale(np.array([255], np.uint8)) == 1
    with pytest.raises(ConfigError, match="no range"):
        Feature((), "float32").scale(np.zeros(1, np.float32))


def test_64_bits_become_32_and_what_does_not_fit_is_refused():
    assert to_device_dtype("x", np.array([1.5])).dtype == np.float32
    assert to_device_dtype("x", np.array([1, 2])).dtype == np.int32
    assert to_device_dtype("x", np.array([2**31 - 1])).tolist() == [2**31 - 1]
    with pytest.raises(DataError, match=r"id holds 2147483648, which does not fit int32"):
        to_device_dtype("id", np.array([2**31]))


def test_stacking_names_the_odd_one_out():
    where = "example {}".format
    ragged = stack([{"x": np.zeros(2)}, {"x": np.zeros(3)}], [7, 8], where)
    with pytest.raises(DataError, match=r"x of example 8 has shape \(3,\), but example 7 has \(2,\).*map"):
        even(ragged, [7, 8], where)
    with pytest.raises(DataError, match=r"example 8 has 'y', but example 7 has 'x'"):
        stack([{"x": 1}, {"y": 1}], [7, 8], where)


WHERE = "example {}".format


def test_text_of_every_kind_is_strings():
    for values in (["a", "é"], np.array(["a", "é"], np.dtypes.StringDType()), np.char.encode(["a", "é"], "utf-8")):
        found = to_device_dtype("x", values)
        assert (found.dtype, found.tolist()) == (object, ["a", "é"])
        assert infer(found) == infer(np.asarray(values)) == Feature((), "str")
    with pytest.raises(DataError, match="x holds bytes that are no text"):
        to_device_dtype("x", np.array([b"\xff\xfe"]))


def test_lists_of_several_lengths_make_no_array():
    with pytest.raises(DataError, match="x holds lists of several lengths, which make no array; pad them"):
        to_device_dtype("x", [[1, 2], [3]])
    with pytest.raises(DataError, match="x holds lists of several lengths"):
        stack([{"x": [[1, 2], [3]]}], [0], WHERE)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([0, 255], np.int32), "uint8"),
        (np.array([0.5, 0.1], np.float32), "float16"),  # floats may be rounded
        (np.array([1, 2], np.int32), "bfloat16"),
        (np.array([True, False]), "float32"),
        (np.array([1.0, 2.0], np.float32), "int32"),
        (np.array([1, 2.5], object), "float32"),
    ],
)
def test_a_cast_that_changes_no_value(values, dtype):
    found = cast("x", Feature((), dtype), values, [0, 1], WHERE)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_allclose(found.astype(np.float32), values.astype(np.float32), rtol=1e-3)


@pytest.mark.parametrize(
    ("values", "dtype", "bad"),
    [
        (np.array([0, 256], np.int32), "uint8", "256"),
        (np.array([3, 2.5], np.float32), "int32", "2.5"),
        (np.array([3, np.nan], np.float32), "int32", "nan"),
        (np.array([1, 2**24 + 1], np.int32), "float32", "16777217"),
        (np.array([1, None], object), "int32", "None"),
        (np.array([1, "2"], object), "int32", "2"),
    ],
)
def test_a_cast_that_changes_a_value_names_the_example(values, dtype, bad):
    with pytest.raises(DataError, match=f"^x of example 8 is {bad}; {dtype} is expected: give all examples one type"):
        cast("x", Feature((), dtype), values, [7, 8], WHERE)


def test_examples_of_several_shapes_are_cast_one_by_one():
    pixels = [np.zeros((2, 3), np.int32), np.full((2, 4), 200), np.full((1, 4), 300)]
    ragged = stack([{"x": p} for p in pixels], [3, 4, 5], WHERE)["x"]
    feature = Feature((None, None), "uint8")
    assert [v.dtype.name for v in cast("x", feature, ragged[:2], [3, 4], WHERE)] == ["uint8", "uint8"]
    with pytest.raises(DataError, match=r"x of example 5 is 300 at \(0, 0\); uint8"):
        cast("x", feature, ragged, [3, 4, 5], WHERE)

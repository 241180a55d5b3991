import numpy as np
import pytest
from PIL import Image

from sapwood.core.errors import ConfigError, DataError
from sapwood.data import decode_image, load

hub = pytest.importorskip("datasets")


@pytest.fixture
def rows():
    features = hub.Features(
        {
            "image": hub.Image(),
            "vector": hub.Sequence(hub.Value("float64"), length=3),
            "text": hub.Value("string"),
            "label": hub.ClassLabel(names=["cat", "dog"]),
            "group": hub.Value("int64"),
        }
    )
    return hub.Dataset.from_dict(
        {
            "image": [np.full((4, 5, 3), i, np.uint8) for i in range(6)],
            "vector": [[i, i + 0.5, i + 1] for i in range(6)],
            "text": [f"number {i}" for i in range(6)],
            "label": [0, 1, 1, 0, 1, 0],
            "group": [3, 2, 1, 0, 1, 2],
        },
        features=features,
    )


def test_rows_of_a_hub_data_set(rows):
    data = load(rows)
    assert data.features["label"].classes == ("cat", "dog")
    batch = data.gather([4, 0])
    assert batch["image"].shape == (2, 4, 5, 3)
    assert batch["image"][:, 0, 0, 0].tolist() == [4, 0]
    np.testing.assert_array_equal(batch["vector"], np.array([[4, 4.5, 5], [0, 0.5, 1]], np.float32))
    assert batch["text"].tolist() == ["number 4", "number 0"]
    assert batch["label"].tolist() == [1, 0]


def test_a_column_becomes_the_label(rows):
    data = load(rows.remove_columns("label"), target="group")
    assert data.features["label"].num_classes == 4
    assert data.gather([0, 5])["label"].tolist() == [3, 2]


def test_the_target_takes_the_place_of_a_column_called_label(rows):
    data = load(rows, target="group")
    assert sorted(data.features) == ["image", "label", "text", "vector"]
    assert (data.features["label"].num_classes, data.features["label"].classes) == (4, None)
    assert data.gather([0, 5])["label"].tolist() == [3, 2]
    data = load(rows.rename_columns({"label": "kind", "group": "label"}), target="kind")
    assert data.features["label"].classes == ("cat", "dog")


def test_a_transform_and_a_choice_of_columns_are_its_users_words(rows):
    def flip(batch):
        return {"pixels": [-np.asarray(v, "float32") for v in batch["vector"]], "label": batch["label"]}

    expected = -np.array([[4, 4.5, 5], [0, 0.5, 1]], np.float32)
    plain = rows.with_format("numpy")
    plain.set_transform(flip)
    for source in (rows.with_transform(flip), plain, hub.DatasetDict({"train": rows}).with_transform(flip)):
        data = load(source)
        assert list(data.features) == ["pixels", "label"]
        batch = data.gather([4, 0])
        np.testing.assert_array_equal(batch["pixels"], expected)
        assert (batch["label"].tolist(), data.features["label"].classes) == ([1, 0], ("cat", "dog"))
    assert load(rows.with_transform(lambda b: {"y": b["group"]}), target="y").features["label"].num_classes is None
    words = rows.with_transform(lambda b: {"x": b["group"], "text": b["text"]})
    assert load(words, target="text").features["label"].classes == tuple(f"number {i}" for i in range(6))
    data = load(rows.with_format("numpy", columns=["vector", "label"]))
    assert list(data.features) == list(data[0]) == ["vector", "label"]
    assert "image" in load(rows.with_format("numpy", columns=["vector"], output_all_columns=True)).features
    with pytest.raises(ConfigError, match="no entry 'label' to be the target; it has 'vector'"):
        load(rows.with_format("numpy", columns=["vector"]), target="label")


def test_a_transform_that_makes_another_label_has_no_old_names(rows):
    def is_dog(batch):
        return {"x": batch["group"], "label": [int(n == 1) + 1 for n in batch["label"]]}

    def shouted(batch):
        return {"x": batch["group"], "label": [text.upper() for text in batch["text"]]}

    def numbered(batch):  # all in class 0 but the rare one, of which no evenly spread example is
        return {"x": batch["group"], "label": [int(n == 2) for n in batch["label"]]}

    many = hub.Dataset.from_dict({"group": [0] * 50, "label": [0] * 30 + [2] + [0] * 19})
    many = many.cast_column("label", hub.ClassLabel(names=["a", "b", "c"]))
    for source, change in ((rows, is_dog), (many, numbered)):
        label = load(source.with_transform(change)).features["label"]
        assert (label.dtype, label.classes) == ("int32", None)
    same = many.with_transform(lambda batch: {"x": batch["group"], "label": batch["label"]})
    assert load(same).features["label"].classes == ("a", "b", "c")
    assert load(rows.with_transform(shouted), remember=True).features["label"].classes is None


def test_lists_of_images_are_refused_with_a_way_round_them(rows):
    pictures = hub.Features({"frames": hub.Sequence(hub.Image()), "label": hub.Value("int64")})
    frames = [[Image.new("RGB", (2, 2), (i, i, i))] * 2 for i in range(3)]
    lists = hub.Dataset.from_dict({"frames": frames, "label": [0, 1, 0]}, features=pictures)
    with pytest.raises(DataError, match=r'frames holds lists of images, .*rows.remove_columns\("frames"\)'):
        load(lists)
    assert list(load(lists.remove_columns("frames")).features) == ["label"]

    def stacked(batch):  # as the message says
        return {"frames": [np.stack([decode_image(x) for x in images]) for images in batch["frames"]]}

    assert load(lists.with_transform(stacked)).gather([2, 1])["frames"][:, 1, 0, 0, 2].tolist() == [2, 1]


def test_what_is_drawn_anew_is_not_remembered(rows):
    count = iter(range(1000))
    data = load(rows.with_transform(lambda b: {"x": [next(count) for _ in b["text"]], "label": b["label"]}))
    first, second = data.gather([0, 1])["x"], data.gather([0, 1])["x"]
    assert second.tolist() == (first + 2).tolist()
    bad = load(rows.with_transform(lambda b: {"x": [float("nan") if next(count) > 60 else 1.0 for _ in b["text"]]}))
    with pytest.raises(DataError, match="x of example"):
        [bad.gather(range(6)) for _ in range(20)]


def test_splits_and_mistakes(rows):
    both = hub.DatasetDict({"train": rows, "test": rows.select([5])})
    assert len(load(both)) == 6
    assert len(load(both, split="test")) == 1
    with pytest.raises(DataError, match="no split 'dev'; it has 'train', 'test'"):
        load(both, split="dev")
    with pytest.raises(ConfigError, match="no entry 'kind' to be the target; it has 'image'"):
        load(rows, target="kind")
    with pytest.raises(DataError, match="empty"):
        load(rows.select([]))


def test_a_validation_part_of_each_class(rows):
    train, valid = load(rows, validation=0.34)
    assert (len(train), sorted(valid.column("label").tolist())) == (4, [0, 1])

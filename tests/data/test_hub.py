import numpy as np
import pytest

from sapwood.core.errors import ConfigError, DataError
from sapwood.data import load

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

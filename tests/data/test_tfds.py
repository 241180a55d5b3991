"""Against real TFDS sets, prepared here in a temporary directory; TensorFlow is not needed for any of it."""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from sapwood.core.errors import ConfigError, DataError
from sapwood.data import Feature, load
from sapwood.data.sources import tfds as sources_tfds


@cache  # TFDS registers a builder by its name when its class is made, and refuses a second one
def builder_class():
    import tensorflow_datasets as tfds

    class SapwoodTestShapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("2.1.0")
        pkg_dir_path = tfds.core.Path(__file__).parent

        def _info(self):
            ranged = tfds.features.Documentation(value_range="0..1.5")
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "grid": tfds.features.Tensor(shape=(2, 3), dtype=np.float64, doc=ranged),
                        "label": np.int64,
                        "kind": tfds.features.ClassLabel(names=["square", "circle", "star"]),
                        "name": tfds.features.Text(),
                        "tags": tfds.features.Sequence(np.int64),
                        "place": {"x": np.float32, "y": np.float32},
                    }
                ),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(30), "test": self._generate_examples(5)}

        def _generate_examples(self, count):
            for i in range(count):
                yield (
                    i,
                    {
                        "grid": np.full((2, 3), 2.0 if i == 29 else i / 30),
                        "label": 100 + i,
                        "kind": i % 3,
                        "name": f"shape {i} é",
                        "tags": list(range(i % 4)),
                        "place": {"x": i, "y": -i},
                    },
                )

    return SapwoodTestShapes


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    import tensorflow_datasets as tfds

    place = tmp_path_factory.mktemp("prepared")
    tfds.disable_progress_bar()
    builder_class()(data_dir=str(place), file_format="array_record").download_and_prepare()
    return place


NAME = "sapwood_test_shapes"


def test_entries_and_features(place):
    data = load(NAME, data_dir=place, target="kind")
    assert len(data) == 30
    assert data.features["grid"] == Feature((2, 3), "float32", low=0, high=1.5)
    assert data.features["label"].classes == ("square", "circle", "star")
    assert data.features["tags"].shape == (None,)
    assert list(data.features) == ["grid", "label", "name", "place/x", "place/y", "tags"]
    kept = data.map(lambda e: {n: v for n, v in e.items() if n != "tags"})
    batch = kept.gather([4, 0])
    np.testing.assert_allclose(batch["grid"][:, 0, 0], [4 / 30, 0], rtol=1e-6)
    assert batch["label"].tolist() == [1, 0]
    assert batch["label"].dtype == np.int32
    assert batch["name"].tolist() == ["shape 4 é", "shape 0 é"]
    assert batch["place/y"].tolist() == [-4, 0]
    assert data[3]["tags"].tolist() == [0, 1, 2]


def test_classes_are_matched_by_name(place):
    data = load(NAME, "test", data_dir=place, target="kind")
    held = data.held_to(load({"label": ["star", "moon", "square", "circle"]}).features)  # sorted: circle, moon, ...
    assert [example["label"] for example in held] == [[2, 0, 3][i] for i in data.column("label")]


def test_a_documented_range_is_held(place):
    with pytest.raises(DataError, match=r"grid of example 29 is 2.0 at \(0, 0\); the range is 0..1.5"):
        load(NAME, data_dir=place)[29]


def test_labels_are_read_alone(place):
    data = load(NAME, data_dir=place, target="kind")
    assert data.column("label").tolist() == [i % 3 for i in range(30)]
    train, valid = load(NAME, data_dir=place, target="kind", validation=0.2)
    assert np.bincount(valid.column("label")).tolist() == [2, 2, 2]
    assert len(train) == 24


def test_a_column_is_read_in_parts(place, monkeypatch):
    monkeypatch.setattr(sources_tfds, "CHUNK", 8)
    source = load(NAME, data_dir=place, target="kind").reader.source
    read, sizes = source._examples, []
    monkeypatch.setattr(source, "_examples", lambda rows, part: sizes.append(len(part)) or read(rows, part))
    assert source.column("label").tolist() == [i % 3 for i in range(30)]
    assert sum(sizes) == 30
    assert max(sizes) == 8
    assert [len(tags) for tags in source.column("tags")] == [i % 4 for i in range(30)]


def test_the_target_takes_the_place_of_an_entry_called_label(place):
    assert load(NAME, data_dir=place)[4]["label"] == 104
    assert load(NAME, data_dir=place).column("label").tolist() == list(range(100, 130))
    assert load(NAME, data_dir=place, target="kind")[4]["label"] == 1


def test_splits(place):
    assert len(load(NAME, "test", data_dir=place)) == 5
    assert len(load(NAME, "train[:50%]+test", data_dir=place)) == 20
    with pytest.raises(DataError, match=f"{NAME} has no split 'dev'; it has train, test"):
        load(NAME, "dev", data_dir=place)
    with pytest.raises(ConfigError, match="no entry 'sort' to be the target; it has 'grid', 'kind'"):
        load(NAME, data_dir=place, target="sort")


def test_by_version_by_folder_and_from_the_environment(place, monkeypatch):
    assert len(load(f"{NAME}:2.1.0", data_dir=place)) == 30
    assert len(load(place / NAME / "2.1.0", "test")) == 5
    monkeypatch.setenv("SAPWOOD_DATA_DIR", str(place))
    assert len(load(NAME)) == 30
    monkeypatch.delenv("SAPWOOD_DATA_DIR")
    monkeypatch.setenv("TFDS_DATA_DIR", str(place))
    assert len(load(NAME)) == 30


def test_damaged_files_are_named(place, tmp_path):
    shutil.copytree(place / NAME, tmp_path / NAME)
    records = next((tmp_path / NAME / "2.1.0").glob("*train.array_record*"))
    records.write_bytes(records.read_bytes()[: records.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cannot be read .*; delete that folder and prepare it again"):
        load(NAME, data_dir=tmp_path).gather(np.arange(30))


@pytest.fixture
def never_tried(monkeypatch):
    """TFDS is not asked to download: it would wait and try again for minutes."""
    import tensorflow_datasets as tfds

    def tried(*_, **__):
        raise AssertionError("TFDS was asked to download")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", tried)


def test_a_known_set_that_cannot_be_had_says_how_to_get_it(tmp_path, never_tried):
    with pytest.raises(DataError) as error:
        load("mnist", data_dir=tmp_path)
    message = str(error.value)
    assert "mnist is not prepared in" in message
    assert "tfds build mnist --file_format=array_record --data_dir=DIR" in message
    assert "data_dir=DIR" in message
    assert "\n" not in message
    assert not list(tmp_path.glob("mnist/*"))


def test_a_set_that_needs_no_tensorflow_is_unreachable_without_network(tmp_path, never_tried):
    with pytest.raises(
        DataError, match=r"iris is not prepared in .*, and its source cannot be reached .*tfds build iris"
    ):
        load("iris", data_dir=tmp_path)


def test_unknown_names_get_the_nearest():
    with pytest.raises(
        DataError, match="no file, folder or TensorFlow data set 'mnits'; the nearest names are 'mnist'"
    ):
        load("mnits")
    with pytest.raises(DataError, match="nearest names are 'digits'"):
        load("digit")
    with pytest.raises(DataError, match="TFDS has no name like it"):
        load("zzzzqqqq")


def test_another_format_says_how_to_prepare_again(place, tmp_path):
    shutil.copytree(place / NAME, tmp_path / NAME)
    info = tmp_path / NAME / "2.1.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(DataError, match=f"{NAME} is prepared as tfrecord in .* no random access; .*--file_format="):
        load(NAME, data_dir=tmp_path)


def test_a_folder_that_is_not_prepared(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="holds no prepared data set"):
        load(tmp_path)


def test_the_real_directory_of_the_user_is_not_touched(home):
    from sapwood.data import data_directory

    assert data_directory() == Path(home) / "tensorflow_datasets"
    assert sources_tfds.data_directory is data_directory


def renamed(folder, to, name):
    """A copy of a prepared set whose `features.json` names another class for one of its entries."""
    copy = Path(shutil.copytree(folder, to))
    text = (copy / "features.json").read_text()
    known = "tensorflow_datasets.core.features.text_feature.Text"
    assert known in text
    (copy / "features.json").write_text(text.replace(known, name))
    return copy


def test_a_feature_class_of_another_package_is_not_imported_unless_trusted(place, tmp_path, monkeypatch):
    from tensorflow_datasets.core.features.feature import FeatureConnector

    folder = sources_tfds._find(NAME, place, ()).data_dir
    package = tmp_path / "strange_features"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from pathlib import Path\nimport tensorflow_datasets as tfds\nPath(__file__).with_name('ran').touch()\n"
        "class Words(tfds.features.Text): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    known = FeatureConnector.__dict__["cls_from_name"]
    copy = renamed(folder, tmp_path / NAME / "2.1.0", "strange_features.Words")
    for source, more in ((copy, {}), (NAME, {"data_dir": tmp_path}), (copy, {"trust": "strange"})):
        with pytest.raises(DataError, match=r"nothing is imported from 'strange_features' .* trust='strange_features'"):
            load(source, **more)
    assert not (package / "ran").exists()
    for source, more in ((copy, {}), (NAME, {"data_dir": tmp_path})):
        assert load(source, trust="strange_features", **more)[3]["name"] == "shape 3 é"
    assert (package / "ran").exists()
    assert FeatureConnector.__dict__["cls_from_name"] is known
    with pytest.raises(ConfigError, match="trust='strange_features' says nothing about"):
        load({"x": np.zeros(3)}, trust="strange_features")

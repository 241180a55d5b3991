"""What training learned of its features holds every later data set to it, by name."""

import jax
import numpy as np
import optax
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

import sapwood as sw
from sapwood.core.errors import DataError
from sapwood.data import Feature, Learned, characters, load

WORDS = {"train": ["ant", "bee", "cow", "ant", "cow", "bee"], "test": ["cow", "bee", "cow"]}


class Rows:
    """A PyTorch data set, as far as anyone can tell."""

    def __init__(self, words):
        self.words = words

    def __len__(self):
        return len(self.words)

    def __getitem__(self, i):
        return {"x": np.float32(i), "label": self.words[i]}


def csv(words, path):
    file = path / f"{len(words)}.csv"
    file.write_text("x,label\n" + "".join(f"{i},{word}\n" for i, word in enumerate(words)))
    return load(file)


def parquet(words, path):
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": range(len(words)), "label": words}), path / f"{len(words)}.parquet")
    return load(path / f"{len(words)}.parquet")


def frame(words, path):
    return load(pytest.importorskip("pandas").DataFrame({"x": range(len(words)), "label": words}))


def hub(words, path, features=None):
    datasets = pytest.importorskip("datasets")
    return load(datasets.Dataset.from_dict({"x": list(range(len(words))), "label": words}, features=features))


def hub_classes(words, path):
    datasets = pytest.importorskip("datasets")
    names = sorted(set(words), reverse=True)
    features = datasets.Features({"x": datasets.Value("int64"), "label": datasets.ClassLabel(names=names)})
    return hub([names.index(word) for word in words], path, features)


def images(words, path):
    home = path / str(len(words))
    for i, word in enumerate(words):
        (home / word).mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), i).save(home / word / f"{i}.png")
    return load(home)


class ImageFolder(Rows):
    """Labels are the places of the words among those that there are, as in torchvision."""

    def __init__(self, words):
        super().__init__(words)
        self.classes = sorted(set(words))

    def __getitem__(self, i):
        return {"x": np.float32(i), "label": self.classes.index(self.words[i])}


class Subset(Rows):
    def __init__(self, words):
        super().__init__(words)
        self.dataset, self.indices = ImageFolder(words), range(len(words))

    def __getitem__(self, i):
        return self.dataset[i]


SOURCES = {
    "csv": csv,
    "parquet": parquet,
    "pandas": frame,
    "hub": hub,
    "hub with classes": hub_classes,
    "folder": images,
    "arrow": lambda words, path: load(pa.table({"x": range(len(words)), "label": words})),
    "dict": lambda words, path: load({"x": np.arange(len(words)), "label": words}),
    "pair": lambda words, path: load((np.arange(len(words))[:, None], words)),
    "rows": lambda words, path: load(Rows(words), classes=sorted(set(words), key=lambda word: word[1])),
    "torchvision": lambda words, path: load(ImageFolder(words)),
    "subset": lambda words, path: load(Subset(words)),
    "text": lambda words, path: load(Rows(words)),
}


@pytest.mark.parametrize("there", sorted({*SOURCES} - {"text"}))
def test_classes_are_matched_by_name_whatever_they_come_from(there, tmp_path):
    """The oracle is the words themselves: what number a class has matters to nobody."""
    learned = Learned(SOURCES[there](WORDS["train"], tmp_path).features)
    names = learned["label"].classes
    for kind, source in SOURCES.items():
        home = tmp_path / kind
        (home / "more").mkdir(parents=True)
        data = source(WORDS["test"], home)
        words = sorted(WORDS["test"]) if kind == "folder" else WORDS["test"]
        held = data.held_to(learned)
        assert [names[i] for i in held.gather(range(3))["label"]] == words, kind
        assert [names[i] for i in held[1:].column("label")] == words[1:], kind
        assert held.features["label"].classes == names, kind
        with pytest.raises(DataError, match=r"'dog', which training did not know: it had .*'ant'"):
            source(["cow", "dog"], home / "more").held_to(learned).gather([0, 1])


def test_numbers_against_names_are_refused_where_they_have_two_readings():
    words, numbers = load({"label": WORDS["train"]}), load({"label": [0, 1, 1]})
    with pytest.raises(DataError, match=r"label is numbers here and had the classes 'ant', 'bee', 'cow'.*classes="):
        numbers.held_to(words.features)
    with pytest.raises(DataError, match="label is the classes 'ant', 'bee', 'cow' here, and numbers without names"):
        words.held_to({"label": Feature((), "int32")})
    assert load({"label": [0, 1]}, classes=["ant", "bee", "cow"]).held_to(words.features).column("label").tolist() == [
        0,
        1,
    ]
    digits = {"label": Feature((), "int32", classes="0123456789")}  # one reading alone
    assert numbers.held_to(digits).column("label").tolist() == [0, 1, 1]
    assert load({"label": ["2", "1"]}).held_to({"label": Feature((), "int32", num_classes=4)})[0]["label"] == 2
    more = load({"label": [0, 5]}).held_to(
        {"label": Feature((), "int32", num_classes=3)}
    )  # a rare one: the same number
    assert more.column("label").tolist() == [0, 5]


def test_classes_of_which_there_is_no_example_are_no_matter():
    learned = load({"label": ["a", "b"]}).features
    data = load({"label": ["b", "c", "b"]})
    assert data.select([0, 2]).held_to(learned).column("label").tolist() == [1, 1]
    with pytest.raises(
        DataError, match="label of example 1 is 'c', which training did not know: it had the classes 'a', 'b'"
    ):
        data[1:].held_to(learned)


def test_columns_are_matched_by_name():
    table = {"a": [1.0, 2.0], "b": [3.0, 4.0], "c": [5.0, 6.0], "t": ["x", "y"]}
    learned = load(pa.table({n: table[n] for n in "cab"})).features
    held = load(pa.table({"extra": [9.0, 9.0], **table})).held_to(learned)
    assert held.gather([1, 0])["features"].tolist() == [[6, 2, 4], [5, 1, 3]]
    assert held.features["features"].columns == ("c", "a", "b")
    with pytest.raises(DataError, match="no column 'c' here: training had 'c', 'a', 'b', here are 'a', 'b'"):
        load(pa.table({n: table[n] for n in "ab"})).held_to(learned)
    with pytest.raises(DataError, match=r"no column 'c' here \('c' is there, but holds no single numbers\)"):
        load(pa.table({"a": [1.0], "b": [2.0], "c": ["n/a"]})).held_to(learned)
    with pytest.raises(DataError, match=r"features has shape \(2,\) here, and training had the columns 'c', 'a', 'b'"):
        load({"features": np.ones((2, 2))}).held_to(learned)
    positions = load({"features": np.ones((2, 3), "float32")})  # nothing says which is which
    assert positions.held_to(learned).column("features").tolist() == [[1, 1, 1]] * 2


def test_ranges_and_types():
    learned = {
        "image": Feature((2,), "uint8", low=0, high=16),
        "x": Feature((2,), "float32"),
        "n": Feature((), "int32"),
    }
    with pytest.raises(DataError, match=r"image of example 1 is 17 at 1; the range is 0..16"):
        load({"image": np.array([[0, 16], [3, 17]], "uint8")}).held_to(learned).gather([0, 1])
    with pytest.raises(DataError, match=r"image has the range 0..255 here and had 0..16 in training"):
        load({"image": np.zeros((1, 2), "uint8")}).declare(image=Feature((2,), "uint8", low=0, high=255)).held_to(
            learned
        )
    with pytest.raises(DataError, match=r"image is float32 here and was uint8 in training: scale it"):
        load({"image": np.ones((1, 2))}).held_to(learned)  # 1.0 is white, and 1 nearly black
    with pytest.raises(DataError, match="x is uint8 here and was float32 in training: scale it"):
        load({"x": np.zeros((1, 2), "uint8")}).held_to(learned)
    data = load({"x": np.array([[1, 2]]), "n": np.array([3.0])}).held_to(learned)
    assert (data[0]["x"].dtype, data[0]["n"].dtype, data[0]["x"].tolist()) == (np.float32, np.int32, [1, 2])


def test_grey_pictures_for_a_model_of_colours():
    colour, grey = (load(([Image.new(mode, (6, 4), 9)] * 2, [0, 1])) for mode in ("RGB", "L"))
    held = grey.held_to(colour.features)
    assert held.features["image"].shape == held[0]["image"].shape == (4, 6, 3)
    assert (held.column("image") == 9).all()
    assert grey.held_to(held.features)[1]["image"].shape == (4, 6, 3)
    with pytest.raises(DataError, match="image has 3 channels here and had 1 in training"):
        colour.held_to(grey.features)
    with pytest.raises(DataError, match="image has 4 channels here and had 3 in training"):
        load((np.zeros((2, 4, 6, 4), "uint8"), [0, 1])).held_to(
            load((np.zeros((2, 4, 6, 3), "uint8"), [0, 1])).features
        )
    lengths = Feature((2, 2, 5), "float32")
    assert load({"x": np.zeros((1, 2, 2, 7), "float32")}).held_to({"x": lengths})[0]["x"].shape == (2, 2, 7)


def test_a_regression_whose_later_targets_are_whole_numbers():
    learned = load((np.zeros(3), [0.5, 2.0, 7.25])).features
    assert load((np.zeros(2), [3, 100])).held_to(learned).column("label").dtype == np.float32


def test_tokens_are_matched_by_character():
    learned = characters("hello world", 3).features
    letters = learned["tokens"].vocabulary
    held = characters("lower", 3).held_to(learned)
    assert ["".join(letters[i] for i in window["tokens"]) for window in held] == ["low", "owe"]
    assert [letters[window["targets"][-1]] for window in held] == ["e", "r"]
    with pytest.raises(DataError, match="tokens is 'z', which training did not know: it had a vocabulary of 8"):
        characters("wozzle", 3).held_to(learned)
    assert load({"tokens": np.array([[7, 0]])}).held_to(learned)[0]["tokens"].tolist() == [7, 0]


def test_weights_maps_and_what_is_equal_stay():
    data = load({"x": np.arange(4.0), "label": ["a", "b", "a", "c"]})
    assert data.held_to(data.features) is data
    assert data.held_to({}) is data
    learned = {"label": Feature((), "int32", classes=("c", "b", "a"))}
    held = data.map(lambda e: {**e, "x": -e["x"]}).weighted([1, 2, 3, 4]).held_to(learned)
    batch = held.gather([3, 1])
    assert (batch["x"].tolist(), batch["label"].tolist(), batch["weight"].tolist()) == ([-3, -1], [0, 1], [4, 2])


def points(seed, words, columns):
    rng = np.random.RandomState(seed)
    centres = {"a": (0, 5), "b": (4, 0), "c": (-4, -4)}
    rows = np.array([centres[w] for w in words]) + rng.randn(len(words), 2)
    return pa.table({**{c: rows[:, "uv".index(c)] for c in columns}, "label": list(words)}), rows


@pytest.mark.slow
def test_fit_evaluate_predict_and_resume_hold_their_data_to_it(tmp_path):
    train, rows = points(0, "abc" * 20, "uv")
    test, others = points(1, "bc" * 20, "vu")
    trainer = sw.Trainer(
        sw.supervised(lambda v, x: sw.layers.Dense(3)(v.logits, x), inputs="features"), optax.adam(0.1)
    )
    options = {"batch_size": 30, "run": tmp_path, "progress": False, "steps_per_call": 1, "validation": test}
    state, history = trainer.fit(train, epochs=20, **options)
    expected = LogisticRegression().fit(rows, list("abc" * 20)).score(others, list("bc" * 20))
    assert expected > 0.95
    assert abs(history[-1]["validation_accuracy"] - expected) <= 0.05
    assert trainer.evaluate(state, test)["accuracy"] == history[-1]["validation_accuracy"]
    logits = trainer.predict(state, test.drop_columns("label"))
    np.testing.assert_allclose(
        logits, others @ state.params["logits"]["kernel"] + state.params["logits"]["bias"], rtol=1e-4
    )
    assert trainer.predict(state, test.set_column(2, "label", [["d"] * 40])).shape == (
        40,
        3,
    )  # labels are no matter there
    with pytest.raises(DataError, match="no column 'u' here") as error:
        trainer.evaluate(state, test.drop_columns("u"))
    assert "in the evaluation data; state.features" in error.value.__notes__[0]
    with pytest.raises(DataError, match="'d', which training did not know"):
        trainer.evaluate(state, test.set_column(2, "label", [["d"] * 40]))
    for learned in (
        sw.load(tmp_path).features,
        sw.load(sw.save(tmp_path / "m", state.params, features=state.features)).features,
    ):
        assert learned == state.features
    assert sw.load(tmp_path / "m").classes == ("a", "b", "c")

    swapped = train.select(["label", "v", "u"])
    longer, _ = trainer.fit(swapped, epochs=21, resume=True, **options)
    unbroken, _ = trainer.fit(train, epochs=21, state=state, **options | {"run": None})
    np.testing.assert_array_equal(longer.params["logits"]["kernel"], unbroken.params["logits"]["kernel"])
    assert longer.features["features"].columns == ("u", "v")
    with pytest.raises(DataError, match="no column 'v' here"):
        trainer.fit(train.drop_columns("v"), epochs=22, resume=True, **options)


def test_a_state_carries_it_through_a_step():
    data = load({"x": np.eye(4, dtype="float32"), "label": [*"abca"]})
    trainer = sw.Trainer(sw.supervised(lambda v, x: sw.layers.Dense(3)(v, x), inputs="x"), optax.sgd(1.0))
    batch = data.gather(range(4))
    state = jax.eval_shape(lambda: trainer.init(0, batch)).replace(features=Learned(data.features))
    shapes, _ = jax.eval_shape(trainer.step, state, batch)
    assert shapes.features["label"].classes == ("a", "b", "c")
    with pytest.raises(DataError, match="'d', which training did not know") as error:
        trainer.evaluate(state, {"x": np.eye(4, dtype="float32")[:2], "label": ["d", "a"]})
    assert "in the evaluation data" in error.value.__notes__[0]

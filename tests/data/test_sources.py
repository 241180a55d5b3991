import threading
import tracemalloc
import zlib
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from PIL import Image

from sapwood.core.errors import ConfigError, DataError
from sapwood.data import Feature, batches, characters, decode_image, load, to_device
from sapwood.data.reader import Reader
from sapwood.data.sources.source import LOOK, Source, _pool

# arrays


def test_arrays_of_a_pair_keep_their_values():
    x, y = np.random.RandomState(0).rand(6, 5, 5, 3), np.array([0, 1, 2, 0, 1, 2])
    data = load((x, y))
    batch = data.gather([4, 0])
    np.testing.assert_array_equal(batch["image"], x[[4, 0]].astype(np.float32))
    assert batch["label"].tolist() == [1, 0]
    assert batch["label"].dtype == np.int32
    assert data.features["label"].num_classes == 3
    assert list(load((x[..., 0], y)).features) == ["features", "label"]
    assert list(load(x).features) == ["image"]


def test_float_labels_are_a_regression_and_text_labels_have_names():
    assert load((np.zeros(2), np.array([0.5, 1]))).features["label"] == Feature((), "float32")
    data = load((np.zeros(3), ["dog", "cat", "dog"]))
    assert data.features["label"].classes == ("cat", "dog")
    assert data.column("label").tolist() == [1, 0, 1]
    assert load((np.zeros(2), ["b", "a"]), classes=["b", "a", "c"]).column("label").tolist() == [0, 1]


def test_signs_are_no_class_numbers():
    """-1 and 1 are what the hinge loss takes; they are kept, and bounded, but not counted as classes."""
    for labels in (np.array([-1, 1, 1]), np.array([[-1], [1], [-1]], "int8")):
        data = load((np.zeros(3), labels))
        assert data.features["label"] == Feature(labels.shape[1:], "int32", low=-1, high=1)
        np.testing.assert_array_equal(data.column("label"), labels)
    assert load((np.zeros(3), np.array([1, 1, 0]))).features["label"].num_classes == 2


def test_bad_arrays():
    with pytest.raises(DataError, match="features has 3, label has 2"):
        load((np.zeros(3), np.zeros(2, int)))
    with pytest.raises(DataError, match="empty"):
        load((np.zeros((0, 4)), np.zeros(0, int)))
    with pytest.raises(DataError, match=r"label of example 1 is -1; classes are counted from 0"):
        load((np.zeros(2), np.array([2, -1])))
    with pytest.raises(DataError, match="label of example 1 is 'cow'; classes are 'cat', 'dog'"):
        load((np.zeros(2), ["cat", "cow"]), classes=["cat", "dog"])
    with pytest.raises(ConfigError, match="no entry 'y' to be the target; it has 'x'"):
        load({"x": np.zeros(2)}, target="y")
    with pytest.raises(DataError, match="x is a single"):
        load({"x": 3.0})


NATIVE = np.arange(12.0).reshape(4, 3)
HIDDEN = np.ma.masked_array(NATIVE, NATIVE > 3)
FIELDS = np.array([(1, 2.0), (3, 4.0)], [("a", int), ("b", float)])


class Graded:
    """As PyTorch's tensor that requires a gradient answers NumPy."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (scipy.sparse.csr_matrix(NATIVE), r"x is a sparse csr_matrix; make it an array with its toarray\(\)"),
        (SimpleNamespace(todense=None, shape=(4, 3)), r"x is a sparse SimpleNamespace; .*todense\(\)"),  # as JAX's
        (FIELDS, r"x has fields \(a, b\); give each as an entry: {n: x\[n\] for n in x.dtype.names}"),
        (HIDDEN, "x has masked values, which no array keeps; fill them first"),
        (Graded(), r"x is a Graded that NumPy cannot read: Can't call numpy.*tensor.detach\(\)"),
        ((i for i in range(4)), "x is a single generator; an array with one row an example is expected"),
        (np.float32(3), "x is a single float32; an array with one row"),
    ],
    ids=["sparse", "sparse of jax", "fields", "masked", "graded", "generator", "scalar"],
)
def test_what_makes_no_array_is_named(values, message):
    with pytest.raises(DataError, match=message):
        load({"x": values, "label": [0, 1, 0, 1]})
    with pytest.raises(DataError, match=message.replace("x ", "label ", 1)):
        load((NATIVE, values))
    if not isinstance(values, np.generic):
        with pytest.raises(DataError):
            load(values)


@pytest.mark.parametrize("dtype", [">f8", ">f4", ">f2", ">i8", ">i4", ">u2", ">c8", "longdouble"])
@pytest.mark.parametrize("lies", ["in memory", "on disk"])
def test_numbers_in_another_order_of_bytes(dtype, lies, tmp_path):
    values, labels = NATIVE.astype(dtype), np.array([0, 2, 1, 0], ">i8")
    if lies == "on disk":
        values, labels = on_disk(tmp_path / "x", values), on_disk(tmp_path / "y", labels)
    data = load({"x": values, "label": labels})
    batch = next(to_device(batches(data, 4, shuffle=False)))
    assert batch["x"].dtype == data.features["x"].dtype
    np.testing.assert_array_equal(batch["x"], NATIVE)
    assert (batch["label"].tolist(), data.column("label").tolist()) == ([0, 2, 1, 0], [0, 2, 1, 0])


def on_disk(path, values):
    written = np.memmap(path, values.dtype, "w+", shape=values.shape)
    written[:] = values
    return written


@pytest.mark.parametrize("dtype", ["float64", ">f4", "int64"])
def test_an_array_in_a_file_is_not_copied(dtype, tmp_path):
    values = on_disk(tmp_path / "x", np.arange(1e6, dtype=dtype).reshape(-1, 1000))
    masks = on_disk(tmp_path / "y", np.arange(1e6).reshape(-1, 1000).astype("uint8") % 7)
    tracemalloc.start()
    data = load((values[:], masks), validation=0.1)[0].select([5, 3])
    batch = data.gather([0, 1])
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < values.nbytes / 2
    np.testing.assert_array_equal(batch["features"], values[data.indices])
    np.testing.assert_array_equal(batch["label"], masks[data.indices])
    assert (batch["label"].dtype, batch["features"].dtype) == (np.int32, data.features["features"].dtype)


def test_a_number_in_a_file_that_does_not_fit_is_an_error(tmp_path):
    data = load({"x": on_disk(tmp_path / "x", np.array([1, 2**40]))})
    assert data[0]["x"] == 1
    with pytest.raises(DataError, match="x holds 1099511627776, which does not fit int32"):
        data[1]


class Polars:
    """What polars' frames look like: columns, an `__array__`, and Arrow's stream with views of text."""

    columns = property(lambda self: ["x", "y", "label"])
    table = pa.table({"x": [1.0, 2.0], "y": [3, 4], "label": pa.array(["b", "a"], pa.string_view())})

    def __array__(self, dtype=None, copy=None):
        return np.array([[1.0, 3, 1], [2, 4, 0]])

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


class Lazy:
    columns, dtypes = ["x"], [float]


FRAME = {"x": [1.0, 2.0], "y": [3, 4], "label": ["b", "a"]}


def frames():
    views = pa.array(["b", "a"], pa.string_view())
    pandas = pytest.importorskip("pandas")
    yield type("Subclass", (pandas.DataFrame,), {})(FRAME, index=[7, 8])
    yield Polars()
    yield pa.RecordBatch.from_pydict(FRAME)
    codes = pa.DictionaryArray.from_arrays(pa.array([0, 1]), views)
    yield pa.table({"x": FRAME["x"], "y": FRAME["y"], "label": codes})


def test_the_label_of_any_frame_is_no_feature():
    for frame in frames():
        data = load(frame)
        assert data.features["features"].columns == ("x", "y"), type(frame)
        assert data.features["label"].classes == ("a", "b")
        assert (data.column("features").tolist(), data.column("label").tolist()) == ([[1, 3], [2, 4]], [1, 0])
    with pytest.raises(
        DataError, match=r"Lazy cannot be read as it is; compute\(\), collect\(\) or to_pandas\(\) makes"
    ):
        load(Lazy())


def test_frames_of_polars():
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(FRAME)
    for made in (frame, frame.with_columns(polars.col("label").cast(polars.Categorical))):
        data = load(made)
        assert (data.features["features"].columns, data.features["label"].classes) == (("x", "y"), ("a", "b"))
        assert data.column("label").tolist() == [1, 0]


def test_a_bad_label_is_named_with_its_example():
    with pytest.raises(DataError, match="label of example 1 is -1; classes"):
        load((np.zeros(3), np.array([0, -1, -7])))
    with pytest.raises(DataError, match="label of example 1 is 'cow'; classes are 'cat', 'dog'"):
        load((np.zeros(2), [["cat", "dog"], ["dog", "cow"]]), classes=["cat", "dog"])
    with pytest.raises(DataError, match="label of example 1 is 3, of type int; labels are expected to be all text"):
        load((np.zeros(2), np.array([["cat", "dog"], ["dog", 3]], object)))


def test_classes_and_labels_of_numpy():
    assert load((np.zeros(2), [0, 1]), classes=np.int64(3)).features["label"].num_classes == 3
    assert load([(0.5, 0), (1.5, 1)], classes=np.int64(3)).features["label"].num_classes == 3
    names = np.array(["b", "a"])
    assert load([(0.5, "b"), (1.5, "a")], classes=names).gather([0, 1])["label"].tolist() == [0, 1]
    for labels in (np.array([b"dog", b"cat"]), np.array(["dog", "cat"], np.dtypes.StringDType())):
        data = load({"name": labels, "label": labels})
        assert (data.features["name"].dtype, data.features["label"].classes) == ("str", ("cat", "dog"))
        assert (data[0]["name"], data[0]["label"]) == ("dog", 1)


def test_the_target_takes_the_place_of_an_entry_called_label():
    arrays = {"y": np.array([2, 1]), "label": np.array([0.5, 0.7]), "x": np.zeros(2)}
    rows = [{"y": 2, "label": 0.5, "x": 0.0}, {"y": 1, "label": 0.7, "x": 0.0}]
    for source in (arrays, rows, dict(reversed(arrays.items()))):
        data = load(source, target="y", classes=3)
        assert sorted(data.features) == ["label", "x"]
        assert data.features["label"].num_classes == 3
        assert data.column("label").tolist() == [2, 1]


def test_an_npz_file(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.arange(4.0), y=np.array([1, 0, 1, 0]))
    data = load(tmp_path / "d.npz", target="y")
    assert data.gather([2])["label"].tolist() == [1]
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with pytest.raises(DataError, match="cannot be read as npz"):
        load(tmp_path / "bad.npz")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="npz"):
        load(tmp_path / "pickled.npz")
    np.savez_compressed(tmp_path / "packed.npz", x=np.arange(1000.0))
    packed = bytearray((tmp_path / "packed.npz").read_bytes())
    packed[60:160] = bytes(100)
    (tmp_path / "packed.npz").write_bytes(packed)
    with pytest.raises(DataError, match=r"packed\.npz cannot be read as npz") as error:
        load(tmp_path / "packed.npz")
    assert isinstance(error.value.__cause__, zlib.error)


@pytest.mark.parametrize("option", [{"size": (4, 4)}, {"weight": "w"}, {"data_dir": "."}, {"split": "test"}])
def test_an_option_that_means_nothing_is_refused(option):
    with pytest.raises(ConfigError, match="says nothing about a tuple of arrays; it takes classes="):
        load((np.zeros(2), np.zeros(2, int)), **option)


# tables


@pytest.fixture
def csv(tmp_path):
    path = tmp_path / "people.csv"
    path.write_text("age,height,name,label,w\n30,1.7,Ada,yes,1\n41,1.8,Bob,no,2\n25,1.6,Cyd,yes,0.5\n")
    return path


def test_a_csv_file(csv):
    data = load(csv, weight="w")
    assert data.features["features"].columns == ("age", "height")
    assert data.features["label"].classes == ("no", "yes")
    batch = data.gather([2, 0])
    np.testing.assert_allclose(batch["features"], [[25, 1.6], [30, 1.7]])
    assert batch["label"].tolist() == [1, 1]
    assert batch["weight"].tolist() == [0.5, 1]
    assert batch["name"].tolist() == ["Cyd", "Ada"]


def test_the_ending_of_a_file_may_be_in_capitals(csv):
    data = load(csv.rename(csv.with_name("PEOPLE.CSV")))
    assert data.features["features"].columns == ("age", "height", "w")
    with pytest.raises(DataError, match=r"label of example 0 \(line 2 of PEOPLE.CSV\) is 1; classes are 0\.\.0"):
        data.declare(label=Feature((), "int32", num_classes=1))[0]


def test_a_parquet_file_a_table_and_a_frame_give_the_same(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = pa.table({"a": [1, 2, 3], "v": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "y": [0.5, 1.5, 2.5]})
    pq.write_table(table, tmp_path / "t.parquet")
    for source in (tmp_path / "t.parquet", str(tmp_path / "t.parquet"), table, pandas.DataFrame(table.to_pandas())):
        batch = load(source, target="y").gather([1, 2])
        np.testing.assert_array_equal(batch["features"], [[2], [3]])
        np.testing.assert_array_equal(batch["v"], [[3, 4], [5, 6]])
        np.testing.assert_array_equal(batch["label"], np.array([1.5, 2.5], np.float32))


def test_an_empty_cell_is_named_by_its_line_and_column(tmp_path):
    path = tmp_path / "gaps.csv"
    path.write_text("age,label\n30,0\n,1\n25,0\n")
    with pytest.raises(DataError, match=r"features column 'age' of example 1 \(line 3 of gaps.csv\) is nan"):
        load(path).gather([0, 1, 2])


def test_a_label_of_a_table_outside_the_declared_classes(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("x,label\n1,0\n2,3\n")
    with pytest.raises(DataError, match=r"label of example 1 \(line 3 of t.csv\) is 3; classes are 0\.\.2"):
        load(path, classes=3).gather([0, 1])


def test_bad_tables(tmp_path, csv):
    with pytest.raises(ConfigError, match="no column 'salary' for target=; it has 'age'"):
        load(csv, target="salary")
    with pytest.raises(DataError, match="there is no file"):
        load(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="has no rows"):
        load(tmp_path / "empty.csv")
    (tmp_path / "uneven.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(DataError, match="cannot be read as csv"):
        load(tmp_path / "uneven.csv")
    (tmp_path / "no.parquet").write_bytes(b"hello")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load(tmp_path / "no.parquet")
    (tmp_path / "book.txt").write_text("hello")
    with pytest.raises(DataError, match=r"no known kind; sapwood\.data.characters"):
        load(tmp_path / "book.txt")


# folders


def picture(path, value, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), value, np.uint8) if mode == "RGB" else np.full(size, value, np.uint8)
    Image.fromarray(pixels).save(path)


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_first_line_of_numbers_needs_a_word(tmp_path):
    iris = written(tmp_path / "iris.csv", "5.1,3.5,setosa\n4.9,3.0,setosa\n6.0,3.4,other\n")
    with pytest.raises(
        DataError, match=r"first line of .*iris\.csv has numbers in it, '5.1,3.5,setosa': say header=False"
    ):
        load(iris)
    data = load(iris, header=False, target="2")
    assert (data.features["features"].columns, data.features["label"].classes) == (("0", "1"), ("other", "setosa"))
    np.testing.assert_allclose(data.column("features"), [[5.1, 3.5], [4.9, 3.0], [6.0, 3.4]])
    assert data.where(2) == "example 2 of iris.csv"
    years = written(tmp_path / "years.csv", "2019,2020\n1,2\n")
    assert load(years, header=True).features["features"].columns == ("2019", "2020")
    pixels = written(tmp_path / "pixels.csv", "label,0,1\n1,7,8\n0,5,6\n")  # "label" is no number
    assert load(pixels).column("features").tolist() == [[7, 8], [5, 6]]
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match="header=True says nothing about"):
        load(tmp_path / "t.parquet", header=True)


def test_an_empty_label_is_no_class(tmp_path):
    with pytest.raises(DataError, match=r"label of example 1 \(line 3 of x\.csv\) is empty; leave that example out"):
        load(written(tmp_path / "x.csv", "a,label\n1,y\n2,\n3,x\n"))
    with pytest.raises(DataError, match="label of example 1 is empty"):
        load((np.zeros(3), ["y", "  ", "x"]))
    assert load((np.zeros(2), ["y", ""]), classes=["", "y"]).column("label").tolist() == [1, 0]
    with pytest.raises(DataError, match=r"label of example 2 \(line 4 of n\.csv\) is nan"):
        load(written(tmp_path / "n.csv", "a,label\n1,1\n2,0\n3,\n")).gather([0, 1, 2])
    assert load((np.zeros(2), [False, False])).features["label"].num_classes == 2


@pytest.mark.parametrize("empty", [False, True])
def test_a_whole_number_that_float32_would_round_is_refused(empty):
    times = [1_700_000_000, 1_700_000_050]
    table = pa.table({"t": [*times, None] if empty else times, "label": [0, 1, 1][: 2 + empty]})
    with pytest.raises(
        DataError, match="is empty in row 2" if empty else r"row 1.* is 1700000050, which float32 rounds to 17000000"
    ):
        load(table)
    assert load(table, columns=()).features.keys() == {"label"}
    assert load(table.set_column(0, "t", [pa.array([float(t) for t in times] + [0.0] * empty)])).features[
        "features"
    ].columns == ("t",)
    exact = np.array([2**24, -(2**24), 2**40, 2**63], object)
    found = load(pa.table({"n": pa.array([int(n) for n in exact[:3]])})).column("features")[:, 0]
    assert [int(n) for n in found] == exact[:3].tolist()
    assert int(load(pa.table({"n": pa.array([2**63], pa.uint64())})).column("features")[0, 0]) == 2**63
    with pytest.raises(DataError, match="is -16777217, which float32 rounds to -16777216"):
        load(pa.table({"n": [1, -16777217]}))


def test_columns_that_no_one_can_learn_from_are_named_with_the_way_round_them(tmp_path):
    import datetime
    import decimal

    table = pa.table({
        "a": [1.0, 2.0], "day": [datetime.date(2020, 1, 1)] * 2, "none": pa.nulls(2), "both": [{"x": 1}, {"x": 2}],
        "price": [decimal.Decimal("1.25"), decimal.Decimal("3.50")], "flag": [True, None], "label": ["n", "y"],
    })  # fmt: skip
    message = (
        r"'day' is of type date32\[day\], column 'none' is empty, column 'both' is of type struct<x: int64>; .*"
        r"columns=\['a', 'price', 'flag', 'label'\]"
    )
    with pytest.raises(DataError, match=message):
        load(table)
    data = load(table, columns=["price", "a"])
    assert data.features["features"].columns == ("price", "a")
    assert data.column("features").tolist() == [[1.25, 1.0], [3.5, 2.0]]
    assert data.features["label"].classes == ("n", "y")
    with pytest.raises(DataError, match=r"features column 'flag' of .*row 1.* is nan"):
        load(table, columns="flag")[1]
    with pytest.raises(ConfigError, match="no column 'b' for columns=; it has 'a', 'day'"):
        load(table, columns=["b"])


def test_text_that_is_not_utf8_and_other_separators(tmp_path):
    for text in ("a,label\n1,café\n", "café,label\n1,x\n"):
        for encoding in ("latin-1", "utf-16"):
            with pytest.raises(DataError, match=r"x\.csv is not UTF-8 text; save it as such, or name its encoding"):
                load(written(tmp_path / "x.csv", text.encode(encoding)))
    assert load(written(tmp_path / "x.csv", "\ufeffa,label\n1,café\n")).features["label"].classes == ("café",)
    with pytest.raises(DataError, match="has one column, 'a;label'; if ';' stands between columns"):
        load(written(tmp_path / "x.csv", "a;label\n1;x\n"))
    with pytest.raises(DataError, match=r"has a column without a name: .*columns=\['a', 'label'\]"):
        load(written(tmp_path / "x.csv", ",a,label\n0,1.5,x\n1,2.5,y\n"))


def test_what_pandas_says_of_a_table_is_kept(tmp_path):
    pandas = pytest.importorskip("pandas")
    size = pandas.Categorical(["high", "mid"], categories=["low", "mid", "high"])
    frame = pandas.DataFrame({"a": [1, 2], "label": size}, index=[7, 3])
    frame.to_parquet(tmp_path / "t.parquet")
    for source in (frame, tmp_path / "t.parquet"):
        data = load(source)
        assert data.features["label"].classes == ("low", "mid", "high")
        assert data.column("label").tolist() == [2, 1]
        assert data.features["features"].columns == ("a",)  # and not the index
    odd = {"a": [1, "x"]}, {"a": pandas.arrays.SparseArray([0.0, 1.0])}
    for columns in odd:
        with pytest.raises(DataError, match=r"the data frame cannot be read: .*column a"):
            load(pandas.DataFrame(columns))


def test_inputs_in_a_frame_keep_the_names_of_their_columns():
    pandas = pytest.importorskip("pandas")
    inputs = pandas.DataFrame({"b": [1.0, 2.0], "a": [3, 4]}, index=[5, 2])
    label = pandas.Series(pandas.Categorical(["y", "x"], categories=["y", "z", "x"]))
    for source in ((inputs, label), {"features": inputs, "label": label}):
        data = load(source)
        assert data.features["features"].columns == ("b", "a")
        assert data.features["label"].classes == ("y", "z", "x")
        swapped = load((inputs[["a", "b"]], ["x", "z"])).held_to(data.features)
        assert swapped.column("features").tolist() == data.column("features").tolist() == [[1, 3], [2, 4]]
        assert swapped.column("label").tolist() == [2, 1]
    with pytest.raises(DataError, match="features is a data frame with 'label' beside numbers"):
        load((inputs.assign(label=[0, 1]), [0, 1]))


def test_cells_of_lists_and_weights_that_are_empty():
    with pytest.raises(DataError, match=r"v of example 1 .*is nan at 1; finite numbers are expected"):
        load(pa.table({"v": [[1.0, 2.0], [3.0, None]], "n": [1, 2]})).gather([0, 1])
    for source, options in ((pa.table({"w": ["heavy", "light"]}), {"weight": "w"}), ({"weight": ["heavy"]}, {})):
        with pytest.raises(DataError, match=r"weight of example 0 is no number: .*'heavy'"):
            load(source, **options)


@pytest.mark.parametrize("name", ["C:/data", "s3://bucket/data", "my data", "table.xlsx", "mnist:", "~/nothing"])
def test_what_looks_like_no_name_is_a_missing_file(name):
    with pytest.raises(DataError, match="there is no file or folder"):
        load(name)


@pytest.fixture
def pets(tmp_path):
    for i, (kind, count) in enumerate([("cat", 3), ("dog", 2)]):
        for k in range(count):
            picture(tmp_path / "pets" / kind / f"{k}.png", 100 * i + k)
    return tmp_path / "pets"


def test_a_folder_of_images_by_class(pets):
    data = load(pets)
    assert data.features["image"] == Feature((6, 4, 3), "uint8", low=0, high=255)
    assert data.features["label"].classes == ("cat", "dog")
    batch = data.gather([4, 0, 1])
    assert batch["image"].shape == (3, 6, 4, 3)
    assert batch["image"][:, 0, 0, 0].tolist() == [101, 0, 1]
    assert batch["label"].tolist() == [1, 0, 0]
    assert data.class_weights().round(3).tolist() == [np.float32(0.833), 1.25]


def test_images_are_read_when_asked_for(pets):
    data = load(pets)
    (pets / "dog" / "1.png").write_bytes(b"not an image")
    data.gather([0, 1, 2, 3])
    with pytest.raises(DataError, match=r"1\.png is not an image that can be read"):
        data[4]


def test_splits_of_a_folder(tmp_path):
    picture(tmp_path / "train" / "cat" / "a.jpg", 1)
    picture(tmp_path / "test" / "cat" / "b.jpg", 2)
    assert len(load(tmp_path)) == 1
    assert load(str(tmp_path), split="test")[0]["image"][0, 0, 0] == 2
    with pytest.raises(DataError, match="no split 'validation'; it has test, train"):
        load(tmp_path, split="validation")


def test_a_class_has_one_number_in_every_split(tmp_path):
    for place in ("train/cat/a", "train/cow/b", "train/dog/c", "test/cat/d", "test/dog/e", "valid/owl/f"):
        picture(tmp_path / f"{place}.png", 1)
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    for split, labels in (("train", [0, 1, 2]), ("test", [0, 2]), ("valid", [3])):
        data = load(tmp_path, split)
        assert data.features["label"].classes == ("cat", "cow", "dog", "owl")
        assert data.column("label").tolist() == labels
    assert load(tmp_path, "test", classes=["dog", "cat"]).column("label").tolist() == [0, 1]


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAINING", "eval"), ("training", "Testing")])
def test_splits_in_capitals_and_by_other_names(train, test, tmp_path):
    for place in (f"{train}/cat/a", f"{train}/dog/b", f"{test}/dog/c", "Val/cat/d"):
        picture(tmp_path / f"{place}.png", 1)
    for split, labels in ((None, [0, 1]), (train, [0, 1]), ("test", [1]), (test, [1]), ("valid", [0])):
        data = load(tmp_path, split)
        assert (data.features["label"].classes, data.column("label").tolist()) == (("cat", "dog"), labels)
    picture(tmp_path / "validation" / "cat" / "e.png", 1)
    assert len(load(tmp_path, "validation")) == 1
    with pytest.raises(DataError, match="several folders for the split 'valid'"):
        load(tmp_path, "valid")


def test_no_class_vanishes_for_the_kind_of_its_files(tmp_path):
    for i, suffix in enumerate(("png", "jfif", "JPE", "bmp")):
        (tmp_path / "abcd"[i]).mkdir()
        kind = "JPEG" if suffix in ("jfif", "JPE") else suffix.upper()
        Image.new("RGB", (4, 4), (9 * i,) * 3).save(tmp_path / "abcd"[i] / f"1.{suffix}", format=kind)
    data = load(tmp_path)
    assert data.features["label"].classes == tuple("abcd")
    assert data.gather(range(4))["image"][:, 0, 0, 0].tolist() == [0, 9, 18, 27]
    (tmp_path / "b" / "2.heic").write_bytes(b"no one reads this")
    with pytest.raises(DataError, match=r"2\.heic is not an image that can be read"):
        load(tmp_path)[2]
    (tmp_path / "aa").mkdir()
    (tmp_path / "aa" / "1.raw").write_bytes(b"nor this")
    with pytest.raises(DataError, match=r"aa holds no image that is known as one \(\.raw\).*classes="):
        load(tmp_path)
    assert load(tmp_path, classes=tuple("abcd")).features["label"].classes == tuple("abcd")


def test_files_beside_images_are_told_of_once(tmp_path, recwarn):
    for name in ("cat/1.png", "dog/1.png"):
        picture(tmp_path / name, 7)
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"")
    assert len(load(tmp_path)) == 2
    assert not recwarn
    for name in ("cat/2", "dog/2.pngx"):
        (tmp_path / name).write_bytes((tmp_path / "cat" / "1.png").read_bytes())
    with pytest.warns(UserWarning, match=r"2 files \(.pngx, 2\) are left out, such as .*cat.2: not known") as told:
        assert len(load(tmp_path)) == 2
    assert len(told) == 1


def test_classes_are_named_once():
    for source in ({"x": np.zeros(2), "label": ["a", "b"]}, (np.zeros(2), [0, 1])):
        with pytest.raises(ConfigError, match="classes have 'a' twice"):
            load(source, classes=["a", "b", "a"])
    with pytest.raises(ConfigError, match="vocabulary have 'b' twice"):
        characters("abab", 2, vocabulary="abb")


def test_a_class_may_be_called_like_a_split(tmp_path):
    for place in ("valid/a", "invalid/b"):
        picture(tmp_path / f"{place}.png", 1)
    assert load(tmp_path).features["label"].classes == ("invalid", "valid")


def test_a_grey_pgm_of_16_bits(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0, 0, 128, 128]))
    assert load(tmp_path)[0]["image"].tolist() == [[[0], [128]]]


def test_the_target_of_a_table_takes_the_place_of_its_label():
    data = load(pa.table({"x": [1.0, 2.0], "label": [5, 6], "y": [0, 1]}), target="y")
    assert (data.features["features"].columns, data.column("label").tolist()) == (("x",), [0, 1])


def test_a_column_whose_name_an_entry_has_is_refused():
    pandas = pytest.importorskip("pandas")
    grey = Image.new("L", (4, 4))
    for features in ([[1.0], [2.0]], ["x", "y"], [grey, grey]):
        frame = pandas.DataFrame({"h": [0.5, 0.6], "k": [1.0, 2.0], "features": features, "label": [0, 1]})
        with pytest.raises(
            DataError, match=r"'features' of the data frame would be an entry 'features'.*'h', 'k'.*name"
        ):
            load(frame)
        assert load(frame.drop(columns=["h", "k"])).features.keys() == {"features", "label"}
    frame = pandas.DataFrame({"x": [1.0, 2.0], "label": ["a", "b"], "y": [0, 1]})
    with pytest.raises(DataError, match=r"'label' of the data frame.* so would 'y'"):
        load(frame, target="y", columns=["x", "label"])
    with pytest.raises(DataError, match=r"'weight' of the data frame.* so would 'x'"):
        load(frame.rename(columns={"label": "weight"}), target="y", weight="x")


def test_a_column_of_pictures_is_no_label_of_a_table():
    pandas = pytest.importorskip("pandas")
    masks = [Image.new("L", (6, 4), i) for i in range(2)]
    frame = pandas.DataFrame({"image": [Image.new("RGB", (6, 4))] * 2, "mask": masks, "k": [1.0, 2.0]})
    for options in ({"target": "mask"}, {"weight": "mask"}):
        with pytest.raises(DataError, match=r"column 'mask' of the data frame, .*, holds pictures"):
            load(frame, **options)
    with pytest.raises(DataError, match="column 'label' of the data frame, the target, holds pictures"):
        load(frame.rename(columns={"mask": "label"}))
    assert load({"image": list(frame["image"]), "label": masks}).features["label"].num_classes == 2


def test_columns_and_target_of_any_kind():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": [1, 2], "a": [1.0, 2.0], "b": [3.0, 4.0], "label": [0, 1]})
    for columns in ((c for c in "ab"), frame.columns[1:3], np.array(["a", "b"]), ("a", "b")):
        assert load(frame, columns=columns).features["features"].columns == ("a", "b")
    numbered = load(pandas.DataFrame({0: [1.0, 2.0], 1: [0, 1]}), target=1)
    assert numbered.features["features"].columns == ("0",)
    assert numbered.column("label").tolist() == [0, 1]


def test_decimals_without_fractions_are_whole_numbers():
    table = pa.table({"t": pa.array([Decimal(1_700_000_000), Decimal(1_700_000_050)]), "label": [0, 1]})
    with pytest.raises(DataError, match=r"row 1.* is 1700000050, which float32 rounds to 1700000000"):
        load(table)
    small = pa.table({"t": pa.array([Decimal(3), Decimal(4)]), "u": pa.array([Decimal("0.25"), Decimal("1.50")])})
    assert load(small).column("features").tolist() == [[3, 0.25], [4, 1.5]]
    with pytest.raises(DataError, match="'t' of the table has decimals beyond 64 bits"):
        load(pa.table({"t": pa.array([Decimal(10**20), Decimal(10**20 + 1)])}))


def test_folders_of_splits_beside_others(tmp_path):
    for place in ("train/cat/a", "test/cat/b", "bus/c"):
        picture(tmp_path / f"{place}.png", 1)
    for split in (None, "train"):
        with pytest.raises(DataError, match=r"folders of splits \(test, train\) beside others \(bus\); move"):
            load(tmp_path, split)
    data = load(tmp_path, classes=["bus", "test", "train"])
    assert data.column("label").tolist() == [0, 1, 2]


def test_sizes_that_differ_need_one_size(pets):
    picture(pets / "dog" / "9.png", 7, size=(10, 8))
    data = load(pets)
    assert data.features["image"].shape == (None, None, 3)
    with pytest.raises(DataError, match=r"image of example 5 \(dog/9.png\) has shape \(10, 8, 3\), but example 0"):
        data.gather([0, 5])
    assert load(pets, size=(5, 5)).gather([0, 5])["image"].shape == (2, 5, 5, 3)
    assert load(pets, size=5).gather([0, 5])["image"].shape == (2, 5, 5, 3)
    assert data.map(lambda e: {**e, "image": e["image"][:4, :4]}).gather([0, 5])["image"].shape == (2, 4, 4, 3)


def test_grey_images_have_one_channel(tmp_path):
    picture(tmp_path / "a" / "1.png", 9, mode="L")
    assert load(tmp_path)[0]["image"].shape == (6, 4, 1)
    assert decode_image(tmp_path / "a" / "1.png").shape == (6, 4, 3)


def test_grey_values_of_16_bits_become_8(tmp_path):
    values = np.array([[0, 128, 129], [257, 128 * 257, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert decode_image(tmp_path / name, grey=True)[..., 0].tolist() == [[0, 0, 1], [1, 128, 255]]
        assert decode_image(tmp_path / name)[1, 1].tolist() == [128] * 3
    (tmp_path / "all").mkdir()
    (tmp_path / "a.tif").rename(tmp_path / "all" / "a.tif")
    assert load(tmp_path)[0]["image"].shape == (2, 3, 1)


@pytest.mark.parametrize(("dtype", "kind"), [("int32", "whole numbers"), ("float32", "floats")])
def test_numbers_of_32_bits_are_no_brightness(tmp_path, dtype, kind):
    Image.fromarray(np.full((2, 3), 70000, dtype)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif holds {kind} of 32 bits, and nothing says which is white"):
        decode_image(tmp_path / "a.tif", grey=True)


def test_an_image_too_large_to_be_safe_is_named(pets, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for read in (load, lambda root: decode_image(root / "cat" / "0.png")):
        with pytest.raises(DataError, match=r"0\.png is too large: Image size \(24 pixels\).*MAX_IMAGE_PIXELS"):
            read(pets)


def test_bad_folders(tmp_path, pets):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="no images in"):
        load(tmp_path / "nothing")
    with pytest.raises(DataError, match="has a folder 'dog'; classes are 'cat'"):
        load(pets, classes=["cat"])
    with pytest.raises(DataError, match="there is no file or folder"):
        load("./no/such/folder")
    with pytest.raises(DataError, match="there is no file"):
        decode_image(tmp_path / "none.png")


# anything indexed


def test_a_list_of_dicts_and_a_torch_data_set():
    torch = pytest.importorskip("torch")
    rows = [{"x": np.full(3, i), "y": i % 2} for i in range(20)]
    data = load(rows, target="y", classes=2)
    assert data.gather([3, 4])["label"].tolist() == [1, 0]
    tensors = torch.utils.data.TensorDataset(torch.arange(20.0).reshape(20, 1), torch.arange(20) % 4)
    data = load(tensors, classes=["a", "b", "c", "d"])
    batch = data.gather([5, 6])
    assert batch["features"].tolist() == [[5], [6]]
    assert batch["label"].tolist() == [1, 2]
    assert data.features["label"].name(2) == "c"


def test_a_grain_data_set():
    import grain

    rows = grain.MapDataset.range(50).map(lambda i: {"x": np.float32(i)}).shuffle(seed=1)
    data = load(rows)
    assert sorted(data.column("x").tolist()) == list(range(50))
    assert data[7]["x"] == rows[7]["x"]


def test_random_augmentation_of_a_torch_data_set_is_not_frozen():
    class Crops:
        def __init__(self, seed):
            self.rng = np.random.RandomState(seed)

        def __len__(self):
            return 9

        def __getitem__(self, i):
            return np.arange(5.0)[self.rng.randint(2) :][:4], i % 3

    data = load(Crops(1))
    seen = {float(data[0]["features"][0]) for _ in range(30)}
    assert seen == {0.0, 1.0}
    with pytest.raises(ConfigError, match=r"is another when it is read again, .* remember=True would freeze"):
        load(Crops(1), remember=True)


def test_only_what_is_plainly_the_same_is_remembered_unasked():
    """Whether an example is drawn at random does not show in a few: this one flips once in a hundred readings."""

    class Rare(list):
        reads = 0

        def __getitem__(self, i):
            self.reads += 1
            return np.float32(-1 if self.reads % 100 == 50 else 1), i % 2

    data = load(Rare(range(20)))
    assert {float(x) for _ in range(10) for x in data.gather(range(20))["features"]} == {1.0, -1.0}
    kept = load(Rare(range(20)), remember=True)
    first, second = ((kept.gather(range(20)), kept.reader.source.rows.reads)[1] for _ in range(2))
    assert first == second
    rows = [(np.arange(4.0), 0), (np.full(4, np.nan), 1)]
    assert [load(rows, remember=said).reader.source.changes for said in (None, True, False)] == [False, False, True]


def test_tensors_of_torch_and_a_part_of_them_are_remembered():
    torch = pytest.importorskip("torch")
    tensors = torch.utils.data.TensorDataset(torch.arange(4.0), torch.arange(4))
    for rows in (tensors, torch.utils.data.Subset(tensors, [1, 3])):
        assert not load(rows).reader.source.changes
    assert load(torch.utils.data.Subset(tensors, [1, 3])).gather([1, 0])["features"].tolist() == [3, 1]


def test_what_a_tuple_of_more_than_two_means_is_for_its_owner_to_say():
    for row in ((np.ones(2), 1, 7), (np.ones(2), 1, 7, "path")):
        message = rf"example 0 is a tuple of {len(row)}, and \(inputs, label\) is expected: .* dict .*\"weight\""
        with pytest.raises(DataError, match=message):
            load([row] * 4)
    assert load([(np.ones(2), 1)])[0]["label"] == 1
    weighed = load([{"x": np.ones(2), "label": 1, "weight": w} for w in (1, 2, -3)])
    assert (weighed[1]["weight"], weighed[1]["weight"].dtype) == (2, np.float32)
    with pytest.raises(DataError, match=r"weight of example 2 is -3; the range is 0"):
        weighed.gather(range(3))


def test_only_a_subset_has_the_classes_of_what_it_wraps():
    class Inner:
        classes = ("plane", "car", "cat")

        def __len__(self):
            return 6

        def __getitem__(self, i):
            return np.float32(i), i % 3

    class IsCat:
        def __init__(self, inner):
            self.dataset = inner

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, i):
            x, y = self.dataset[i]
            return x, int(y == 2)

    class Subset(IsCat):
        indices = range(6)

        def __getitem__(self, i):
            return self.dataset[self.indices[i]]

    assert load(Subset(Inner())).features["label"].classes == ("plane", "car", "cat")
    for rows in (IsCat(Inner()), Subset(IsCat(Inner()))):
        assert load(rows).features["label"].classes is None
    assert load(IsCat(Inner()), classes=["no", "cat"]).features["label"].classes == ("no", "cat")


def test_many_at_once_where_the_object_can():
    asked = []

    class Rows:
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return (np.float32(i),)

        def __getitems__(self, indices):
            asked.append(list(indices))
            return [self[i] for i in indices]

    data = load(Rows(), remember=True)
    assert data.gather([30, 2])["features"].tolist() == [30, 2]
    assert asked == [[2, 30]]
    data.gather([2, 30, 3])
    assert asked == [[2, 30], [3]]  # what was read is remembered


def test_lengths_that_vary_are_seen_and_padded_by_map():
    data = load([{"tokens": np.arange(1 + i % 3)} for i in range(9)])
    assert data.features["tokens"].shape == (None,)
    with pytest.raises(DataError, match=r"tokens of example 1 has shape \(2,\), but example 0 has \(1,\)"):
        data.gather([0, 1])
    padded = data.map(lambda e: {"tokens": np.pad(e["tokens"], (0, 3 - len(e["tokens"])))})
    assert padded.gather([0, 1, 2])["tokens"].tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 2]]


def test_whole_numbers_and_fractions_are_floats():
    assert load([0, 0.5, 1.0]).gather([1, 0, 2])["features"].tolist() == [0.5, 0, 1]
    data = load([{"y": 3}, {"y": 2.5}])
    assert data.features["y"] == Feature((), "float32")
    assert data[0]["y"].dtype == np.float32
    assert data.gather([0, 1])["y"].tolist() == data.column("y").tolist() == [3, 2.5]
    assert load([True, 2]).gather([0, 1])["features"].tolist() == [1, 2]


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_a_later_example_of_another_type_is_cast_or_refused(memory, monkeypatch):
    monkeypatch.setattr("sapwood.data.reader.REMEMBER", memory)
    rows = [{"y": np.float32(i)} for i in range(50)]
    rows[3] = {"y": 3}
    assert load(rows)[3]["y"].dtype == np.float32
    rows = [{"y": i} for i in range(50)]
    rows[3], rows[4] = {"y": 3.0}, {"y": 4.5}
    data = load(rows)
    assert data[3]["y"].dtype == np.int32
    for read in (lambda: data.gather([2, 4]), lambda: data.column("y")):
        with pytest.raises(DataError, match=r"y of example 4 is 4\.5; int32 is expected: give all examples one type"):
            read()
    assert data.declare(y=Feature((), "float32")).gather([3, 4])["y"].tolist() == [3, 4.5]


def test_types_that_have_nothing_in_common():
    with pytest.raises(DataError, match="y is int32 in one example and text in another; one type is expected"):
        load([{"y": 1}, {"y": "one"}])
    assert load([{"y": 1}, {"y": None}]).features["y"].dtype == "object"
    assert load([{"y": None}, {"y": "one"}]).features["y"].dtype == "object"


def test_bad_objects():
    with pytest.raises(DataError, match=r"generator cannot be read; .* make a list of it"):
        load(x for x in range(3))
    with pytest.raises(DataError, match="empty"):
        load([])
    with pytest.raises(ConfigError, match="example 0 has no entry 'y' to be the target; it has 'x'"):
        load([{"x": 1}], target="y")


# the reader


class Counting(Source):
    threads = 1

    def __init__(self, shape=()):
        self.features = {"x": Feature(shape, "float32")}
        self.reads = []

    def __len__(self):
        return 10

    def read(self, index):
        self.reads.append(index)
        return {"x": np.full([d or 2 for d in self.features["x"].shape], index, np.float32)}


def test_a_source_of_ones_own():
    assert load(Counting())[4]["x"] == 4
    with pytest.raises(ConfigError, match="says nothing about a Source; it takes no options"):
        load(Counting(), split="test")


def test_examples_of_fixed_shape_are_read_once():
    source = Counting()
    reader = Reader(source, source.features)
    for _ in range(3):
        assert reader.gather(np.array([3, 1, 3]))["x"].tolist() == [3, 1, 3]
    assert sorted(source.reads) == [1, 3]
    for _ in range(2):
        assert reader.gather(np.arange(10))["x"].tolist() == list(range(10))
    assert sorted(source.reads) == list(range(10))


def test_a_bad_example_is_not_remembered_as_good():
    source = Counting()
    reader = Reader(source, {"x": Feature((), "float32", high=5)})
    for _ in range(2):
        with pytest.raises(DataError, match=r"x of example 6 is 6.0; the range is \.\.5"):
            reader.gather(np.array([6, 2]))
    assert reader.gather(np.array([2]))["x"].tolist() == [2]


def test_what_is_too_large_to_remember_is_read_again(monkeypatch):
    monkeypatch.setattr("sapwood.data.reader.REMEMBER", 39)  # ten float32 take 40
    source = Counting()
    reader = Reader(source, source.features)
    for _ in range(2):
        reader.gather(np.array([3]))
    assert source.reads == [3, 3]


def test_remembered_examples_cannot_be_changed_from_outside():
    source = Counting()
    reader = Reader(source, source.features)
    reader.gather(np.arange(10))["x"][:] = -1
    assert reader.gather(np.arange(10))["x"].tolist() == list(range(10))


@pytest.mark.parametrize(("short", "several"), [(1e9, False), (0, True)])
def test_threads_read_what_takes_long_and_one_what_does_not(short, several, monkeypatch):
    monkeypatch.setattr("sapwood.data.sources.source.SHORT", short)
    readers, two = set(), threading.Barrier(2, timeout=300)

    def read(numbers):
        readers.add(threading.get_ident())
        if threading.current_thread() is not threading.main_thread():
            two.wait()  # until another thread reads, too
        return numbers

    source = Source()
    for _ in range(3):
        assert source.in_parts(read, list(range(40))) == list(range(40))
    assert (len(readers) > 1) == several


def test_a_source_over_another_does_not_wait_for_its_own_thread(monkeypatch):
    """Eight threads that each wait for parts that only the eight could read would wait for ever."""
    monkeypatch.setattr("sapwood.data.sources.source.SHORT", 0)
    readers, source = set(), Source()

    def read(numbers):
        readers.add(threading.get_ident())
        return numbers

    inner = _pool().submit(lambda: source.in_parts(read, list(range(40))))
    assert inner.result(timeout=300) == list(range(40))
    assert len(readers) == 1


def test_how_long_an_example_takes_is_looked_at_again(monkeypatch):
    monkeypatch.setattr("sapwood.data.sources.source.SHORT", 1e-3)
    pauses, sizes, source = iter([0.1] + [0.0] * 1000), [], Source()
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr("sapwood.data.sources.source.time", clock)

    def read(numbers):
        sizes.append(len(numbers))
        clock.now += next(pauses)
        return numbers

    for _ in range(LOOK + 1):  # the first look finds a cold file
        assert source.in_parts(read, list(range(40))) == list(range(40))
    assert sizes[0] == sizes[-2] == 2
    assert sizes[-1] == 38


def test_threads_give_examples_in_order(pets, monkeypatch):
    monkeypatch.setattr("sapwood.data.sources.source.SHORT", 0)
    for k in range(60):
        picture(pets / "cat" / f"x{k:02}.png", k)
    data = load(pets)
    pixels = data.gather(np.arange(3, 63))["image"][:, 0, 0, 0]
    assert pixels.tolist() == list(range(60))


def test_what_unpacks_to_a_flood_is_refused_and_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("sapwood.data.file_checks.ROOM", 1 << 20)
    np.savez_compressed(tmp_path / "flood.npz", x=np.zeros(1 << 21, "uint8"))
    with pytest.raises(DataError, match=r"would unpack to 2,097,\d+, .*: load\(dict\(np\.load\('flood\.npz'\)\)\)"):
        load(tmp_path / "flood.npz")
    assert len(load(dict(np.load(tmp_path / "flood.npz")))) == 1 << 21
    measured = np.random.default_rng(0).integers(0, 9, 1 << 21).astype("uint8")
    np.savez_compressed(tmp_path / "honest.npz", x=measured)
    np.testing.assert_array_equal(load(tmp_path / "honest.npz").column("x"), measured)


def test_examples_of_nothing_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((9, 0)), y=np.arange(9))
    with pytest.raises(DataError, match=r"x of .* has 9 examples that hold nothing"):
        load(tmp_path / "x.npz")


def test_a_table_of_many_columns_is_read_and_one_of_too_many_is_counted(tmp_path):
    path = tmp_path / "wide.csv"
    names = [
        f"a name that makes the first line longer than what is read at once and longer still by this {i}"
        for i in range(12_000)
    ]
    path.write_text("\n".join([",".join(names), ",".join(["1"] * 12_000), ",".join(["2"] * 12_000)]))
    assert path.stat().st_size > 1 << 20
    data = load(path)
    assert data.features["features"].columns == tuple(names)
    np.testing.assert_array_equal(data.column("features"), np.repeat([[1.0], [2.0]], 12_000, 1))
    path.write_text(",".join("abc" for _ in range(10**5)) + "\n" + "1," * (10**5 - 1) + "1")
    with pytest.raises(DataError, match=r"has 100,000 columns, and at most 32,768 are read from a table"):
        load(path)


def test_errors_of_numbers_name_their_example():
    with pytest.raises(DataError, match=r"y of example 1 holds 2147483648, which does not fit int32"):
        load({"y": np.array([1, 2**31, 3, 2**33])})
    with pytest.raises(DataError, match=r"label of example 2 holds -2147483649, which"):
        load({"x": np.zeros(3), "label": np.array([0, 1, -(2**31) - 1])})
    with pytest.raises(DataError, match="weight of example 1 is no number"):
        load({"x": np.zeros(3), "weight": ["1", "heavy", "2"]})
    train = load({"x": np.zeros(3), "label": np.array(["a", "b", "c"])}).features
    told = load([{"x": np.float32(0), "label": word} for word in ("a", "c", "d", "b")]).held_to(train)
    with pytest.raises(DataError, match=r"^example 2: label is 'd', which training did not know"):
        told.gather(range(4))
    numbers = load([{"n": np.float32(x)} for x in (1, 2, 2.5)])
    with pytest.raises(DataError, match=r"^example 2: n is float32 here, with 2.5"):
        numbers.held_to(load({"n": np.arange(3)}).features).gather(range(3))


def test_a_batch_far_larger_than_the_data_is_refused():
    data = load({"x": np.zeros(5)})
    assert len(next(iter(batches(data, 1000)))["x"]) == 1000
    with pytest.raises(ConfigError, match=r"a batch of 1,000,000,000,000 would hold each of 5 examples"):
        batches(data, 10**12)

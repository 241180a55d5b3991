"""`Table`: a source of examples from CSV, TSV and Parquet files and from data frames of any library that exports Arrow.

The whole table is in memory. `from_file` and `from_frame` make a pyarrow table of a file or a data frame. `Table`
converts the columns of that pyarrow table to the entries of examples.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.feature import Feature, infer, to_device_dtype
from sapwood.data.file_checks import check_unpacked
from sapwood.data.image.column import ImageColumn
from sapwood.data.image.decode import is_picture
from sapwood.data.sources.labels import Classes, encode, weights
from sapwood.data.sources.source import ArraySource

EXACT = 2**24  # float32 represents every integer up to this exactly
COLUMNS = 1 << 15  # most columns of a file; pyarrow takes 10 kB for each, even an empty one
CELL = 8  # bytes of a number in a table
LINE = 8 << 20  # most bytes of the first line of a CSV file
BLOCK = 1 << 20  # bytes that pyarrow reads at once; more if the first line is longer


class Table(ArraySource):
    """A source of the rows of a pyarrow table.

    All numeric columns together become "features", float32 `(columns,)`. The target becomes "label", the weights
    "weight". A column of lists of one length, of text or of images becomes an entry of its own name, which must not be
    one of those three.

    Args:
        table: the pyarrow table.
        name: the name of the table in error messages.
        target: the column that becomes "label"; default the column "label" or else "target", if there is one.
        classes: the names of the label's classes or their number. By default they are the sorted texts, the integers
            from 0 to the largest, or the categories of a pandas categorical.
        weight: the column of weights; None for no weights.
        columns: the columns to read besides target and weight, in order; default all.
        pictures: columns of images that are not in the table, by name.

    Raises:
        ConfigError: there is no such column, or `classes` are given and there is no target.
        DataError: the table is empty, or a column cannot be converted.
    """

    def __init__(
        self,
        table: Any,
        name: str,
        target: str | None,
        classes: Classes,
        weight: str | None,
        columns: Sequence[str] | None,
        pictures: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.name = name
        table, pictures = _apart(table, name, pictures)
        columns = None if columns is None else [str(c) for c in ([columns] if isinstance(columns, str) else columns)]
        target, weight = (None if column is None else str(column) for column in (target, weight))
        there = [*table.column_names, *pictures]
        target = target or next((n for n in ("label", "target") if n in there), None)
        chosen = _chosen(table, there, name, target, weight, columns)
        _refuse_pictures(pictures, name, target, weight)
        table = table.select([column for column in chosen if column not in pictures])
        if classes is not None and target is None:
            raise ConfigError(
                f"classes describe a label; name its column with target=: {', '.join(map(repr, table.column_names))}"
            )
        if target is not None and classes is None:
            classes = _categories(table, target)
        found = _columns(table, name)
        numeric = [n for n, c in found.items() if c.ndim == 1 and c.dtype != object and n not in (target, weight)]
        others = {target, weight, *numeric}
        own = [n for n in chosen if n not in others]
        _refuse_taken(own, name, numeric, target, weight)
        arrays: dict[str, np.ndarray | ImageColumn] = {}
        features: dict[str, Feature] = {}
        for entry in (n for n in chosen if n in pictures):
            made = ImageColumn(pictures[entry], lambda index, entry=entry: f"{entry} of {self.where(index)}")
            arrays[entry], features[entry] = made, made.feature
        if numeric:
            arrays["features"] = np.stack([self._as_float32(n, found[n]) for n in numeric], 1)
            features["features"] = Feature((len(numeric),), "float32", columns=tuple(numeric))
        for column in (n for n in own if n in found):
            arrays[column] = kept = to_device_dtype(column, found[column])
            features[column] = infer(kept)
        if target is not None:
            arrays["label"], features["label"] = encode(found[target], classes, where=self.where)
        if weight is not None:
            arrays["weight"], features["weight"] = weights(found[weight])
        super().__init__(arrays, features)

    def _as_float32(self, name: str, values: np.ndarray) -> np.ndarray:
        """Convert a column to float32. Raises `DataError` for an integer that float32 cannot represent exactly."""
        made = values.astype(np.float32)
        if values.dtype.kind in "iu" and values.size and (values.max() > EXACT or values.min() < -EXACT):
            large = np.flatnonzero((values > EXACT) | (values < -EXACT))
            rounded = next((i for i in large if int(made[i]) != int(values[i])), None)
            if rounded is not None:
                raise DataError(
                    f"column {name!r} of {self.where(int(rounded))} is {values[rounded]}, which float32 rounds to "
                    f"{int(made[rounded])}, and others with it: subtract an offset or scale it, make it float64 where "
                    "that is no matter, or leave it out with columns="
                )
        return made

    def where(self, index: int) -> str:
        if self.name.lower().endswith((".csv", ".tsv")):
            return f"example {index} (line {index + 2} of {self.name})"
        return f"example {index} (row {index} of {self.name})"


def from_file(
    path: Path,
    target: str | None,
    classes: Classes,
    weight: str | None,
    columns: Sequence[str] | None,
    header: bool | None,
) -> Table:
    """A source of the rows of a CSV, TSV or Parquet file.

    Args:
        path: the file. Its suffix says its format.
        target, classes, weight, columns: as in `Table`.
        header: whether the first line of a CSV or TSV file names the columns. None means True, but refuses a first line
            that may be an example, since it has numbers (`_read_csv`).

    Raises:
        DataError: the file is missing, damaged or too large for a table, or its first line is refused.
        ConfigError: `header` is given for a Parquet file.
    """
    import pyarrow as pa

    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            table = _read_csv(
                path,
                "\t" if kind == ".tsv" else ",",
                header,
                {"label", "target", *(str(c) for c in (target, weight) if c is not None)},
            )
        elif header is not None:
            raise ConfigError(f"header={header} says nothing about {path.name}; it has the names of its columns")
        else:
            table = _read_parquet(path)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as {kind[1:]}: {str(error).splitlines()[0]}") from error
    made = Table(table, path.name, target, classes, weight, columns)
    if header is False:
        made.where = f"example {{}} of {path.name}".format
    return made


def _read_parquet(path: Path) -> Any:
    """The table of a Parquet file. A few bytes may stand for many rows, so its size in memory is checked first."""
    from pyarrow import parquet

    about = parquet.read_metadata(path)
    _check_columns(path, about.num_columns)
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    stored = sum(group.total_byte_size for group in groups)
    instead = f"load(pyarrow.parquet.read_table({path.name!r}))"
    check_unpacked(path, max(stored, CELL * about.num_rows * about.num_columns), instead)
    return parquet.read_table(path)


def _check_columns(path: Path, count: int) -> None:
    """Raise `DataError` for more than `COLUMNS` columns."""
    if count > COLUMNS:
        raise DataError(
            f"{path} has {count:,} columns, and at most {COLUMNS:,} are read from a table; keep so many numbers in an "
            ".npz, one array (rows, columns)"
        )


def is_frame(value: Any) -> bool:
    """Whether `value` is a data frame or a pyarrow table, judged by its class's attributes.

    It has `columns`, and either `dtypes` or an Arrow stream (`__arrow_c_stream__`).
    """
    kind = type(value)
    return hasattr(kind, "columns") and (hasattr(kind, "__arrow_c_stream__") or hasattr(kind, "dtypes"))


def from_frame(
    frame: Any, target: str | None, classes: Classes, weight: str | None, columns: Sequence[str] | None
) -> Table:
    """A source of the rows of a data frame or a pyarrow table; the index of a pandas frame is left out.

    The other arguments are those of `Table`. Raises `DataError` for a lazy or distributed frame.
    """
    import pyarrow as pa

    pictures = {}
    if any(c.__module__.split(".")[0] == "pandas" for c in type(frame).__mro__):
        kinds = frame.dtypes.items() if len(frame) else ()
        seen = [n for n, kind in kinds if kind.kind == "O" and is_picture(frame[n].iloc[0])]
        pictures = {str(n): list(frame[n]) for n in seen}
        table = _of_pandas(frame.drop(columns=seen))
    elif hasattr(frame, "__arrow_c_stream__"):
        table = pa.table(frame)
    else:
        kind = f"{type(frame).__module__.split('.')[0]} {type(frame).__name__}"
        raise DataError(
            f"a {kind} cannot be read as it is; compute(), collect() or to_pandas() makes it a frame in memory"
        )
    name = "the table" if isinstance(frame, pa.Table | pa.RecordBatch) else "the data frame"
    return Table(table, name, target, classes, weight, columns, pictures)


def _of_pandas(frame: Any) -> Any:
    """A pandas data frame as a pyarrow table, without its index."""
    import pyarrow as pa

    if not len(frame.columns):
        return pa.table({})
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError) as error:  # mixed types, sparse columns, duplicate names
        said = "; ".join(str(part) for part in error.args)
        raise DataError(f"the data frame cannot be read: {said}") from error


def _apart(table: Any, name: str, pictures: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Split a pyarrow table: the table without columns of images, and all columns of images, `pictures` included."""
    if not table.num_rows and not pictures:
        raise DataError(f"{name} has no rows; at least one example is needed")
    if len(set(table.column_names)) != table.num_columns:
        raise DataError(f"{name} has two columns of one name: {', '.join(map(repr, table.column_names))}")
    encoded = [field.name for field in table.schema if _is_encoded(field.type)]
    return table.drop_columns(encoded), {**pictures, **{n: table.column(n) for n in encoded}}


def _is_encoded(kind: Any) -> bool:
    """Whether a column holds images as in Parquet files of Hugging Face: a struct of "bytes" and "path"."""
    import pyarrow as pa

    return pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}


def inputs_of(frame: Any, name: str) -> tuple[np.ndarray, Feature]:
    """Convert a data frame of numbers to one array, float32 `(rows, columns)`.

    Also returns the feature of that array, which has the names of the columns. Raises `DataError` if a column does not
    hold numbers, or is called "label" or "target".
    """
    table = from_frame(frame, None, None, None, None)
    others = [column for column in table.arrays if column != "features"]
    if others:
        raise DataError(
            f"{name} is a data frame with {', '.join(map(repr, others))} beside numbers; give numbers alone here, or "
            "the whole frame, with target="
        )
    return np.asarray(table.arrays["features"]), table.features["features"]


def _read_csv(path: Path, delimiter: str, header: bool | None, roles: set[str | None]) -> Any:
    """The table of a CSV or TSV file.

    Args:
        path: the file.
        delimiter: what separates columns.
        header: whether the first line names the columns. None means True, but refuses a first line with numbers.
        roles: names of columns, such as "label". A first line with one of these names is accepted despite numbers.

    Raises:
        DataError: the file is not UTF-8, has another delimiter, too long a first line or too many columns, or it is not
            clear whether its first line names the columns.
    """
    import pyarrow as pa
    from pyarrow import csv

    with path.open("rb") as file:
        first = file.readline(LINE)
    if len(first) == LINE:
        raise DataError(f"{path} is no table: its first line has more than {LINE:,} bytes")
    _check_columns(path, first.count(delimiter.encode()) + 1)
    block = max(BLOCK, 2 * len(first))  # pyarrow silently loses a line longer than a block
    options = csv.ReadOptions(autogenerate_column_names=header is False, block_size=block)
    try:
        if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UnicodeError
        table = csv.read_csv(path, read_options=options, parse_options=csv.ParseOptions(delimiter=delimiter))
        names = [str(i) for i in range(table.num_columns)] if header is False else table.column_names
        if any(pa.types.is_binary(kind) for kind in table.schema.types):
            raise UnicodeError
    except UnicodeError:
        raise DataError(
            f"{path} is not UTF-8 text; save it as such, or name its encoding to pyarrow: load(csv.read_csv(path, "
            "read_options=csv.ReadOptions(encoding='latin-1')))"
        ) from None
    if len(names) == 1 and (other := next((c for c in ";\t|" if c in names[0]), None)):
        raise DataError(
            f"{path} has one column, {names[0]!r}; if {other!r} stands between columns, say so to pyarrow: "
            f"load(csv.read_csv(path, parse_options=csv.ParseOptions(delimiter={other!r})))"
        )
    if header is None and not roles & set(names) and any(map(_is_number, names)):
        raise DataError(
            f"the first line of {path} has numbers in it, {','.join(names)!r}: say header=False if it is the first "
            "example (columns are then called '0', '1', ...), or header=True if it names the columns"
        )
    return table.rename_columns(names)


def _is_number(text: str) -> bool:
    """Whether Python reads the text as a float."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _chosen(
    table: Any, there: list[str], name: str, target: str | None, weight: str | None, columns: Sequence[str] | None
) -> list[str]:
    """The names of the columns to read, including `target` and `weight`, without the index of a pandas frame.

    Args:
        table: the pyarrow table without columns of images.
        there: the names of all columns.
        name: the name of the table in messages.
        target: the column of labels, or None.
        weight: the column of weights, or None.
        columns: the other columns to read; None for all.

    Raises:
        ConfigError: there is no such column.
        DataError: a column has no name.
    """
    asked = [("columns", column) for column in columns or ()] + [("target", target), ("weight", weight)]
    for role, column in asked:
        if column is not None and column not in there:
            raise ConfigError(f"{name} has no column {column!r} for {role}=; it has {', '.join(map(repr, there))}")
    if columns is None:
        index = (table.schema.pandas_metadata or {}).get("index_columns", ())
        columns = [column for column in there if column not in index]
        if "" in columns:
            raise DataError(
                f"{name} has a column without a name: write it without pandas' index (index=False), or name those to "
                f"read, columns={[column for column in columns if column]}"
            )
        if target not in (None, "label") and weight != "label":
            columns = [column for column in columns if column != "label"]  # the target takes its place
    return list(dict.fromkeys([*columns, *(c for c in (target, weight) if c is not None)]))


def _refuse_pictures(pictures: Mapping[str, Any], name: str, target: str | None, weight: str | None) -> None:
    """Raise `DataError` if the label or the weights are a column of images."""
    role, column = next(((r, c) for r, c in (("target", target), ("weight", weight)) if c in pictures), (None, None))
    if column is not None:
        raise DataError(
            f"column {column!r} of {name}, the {role}, holds pictures; numbers or text are expected. Rename it if it "
            "is an input; labels that are pictures, such as masks, are read from lists: "
            "load({'image': [...], 'label': [...]})"
        )


def _refuse_taken(own: list[str], name: str, numeric: list[str], target: str | None, weight: str | None) -> None:
    """Raise `DataError` if two entries would have the same name, so that one of them would be lost.

    Columns in `own` become entries of their own names. The columns in `numeric` become "features", `target` becomes
    "label" and `weight` becomes "weight".
    """
    made = {
        "features": ", ".join(map(repr, numeric)),
        "label": target and repr(target),
        "weight": weight and repr(weight),
    }
    for column in own:
        if others := made.get(column):
            raise DataError(
                f"column {column!r} of {name} would be an entry {column!r}, and so would {others}: give it another "
                f"name, as rename(columns={{{column!r}: '{column}_'}}) of pandas does, or leave it out with columns="
            )


def _categories(table: Any, target: str) -> list[str] | None:
    """The categories of a target that is a pandas categorical of text, in order; else None.

    Dictionary columns of other libraries are only a storage format, so their order has no meaning.
    """
    import pyarrow as pa

    kind = table.schema.field(target).type
    if not pa.types.is_dictionary(kind) or not table.schema.pandas_metadata:
        return None
    words = table.column(target).combine_chunks().dictionary.to_pylist()
    return words if all(isinstance(word, str) for word in words) else None


def _columns(table: Any, name: str) -> dict[str, np.ndarray]:
    """The columns of a pyarrow table as NumPy arrays, by name.

    Raises `DataError` if columns are not numbers, text or lists. The message names all of these columns.
    """
    names = table.column_names  # not table.column(name), which searches all columns for the name
    found = {n: _column(column.combine_chunks(), n, name) for n, column in zip(names, table.columns, strict=True)}
    odd = [column for column, values in found.items() if values is None]
    if odd:
        kinds = [str(table.schema.field(column).type) for column in odd]
        said = ", ".join(
            f"column {column!r} is {'empty' if kind == 'null' else f'of type {kind}'}"
            for column, kind in zip(odd, kinds, strict=True)
        )
        rest = [column for column in found if column not in odd]
        raise DataError(
            f"{name} cannot be learned from as it is: {said}; numbers, text and lists of numbers can. Turn it into "
            f"those, or name the columns to read, columns={rest}"
        )
    return {column: values for column, values in found.items() if values is not None}


def _column(column: Any, name: str, table: str) -> np.ndarray | None:
    """A pyarrow array as a NumPy array of numbers, text or lists of numbers; None for any other type.

    Empty cells of numbers become NaN, which `data.check` reports later with the name of the example.

    Raises `DataError` for an empty cell in a column of text, of lists or of integers beyond `EXACT`, and for lists of
    several lengths.
    """
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(column.type):
        names = column.dictionary
        column = (names.cast(pa.large_string()) if types.is_string_view(names.type) else names).take(column.indices)
    if types.is_boolean(column.type) and column.null_count:
        column = column.cast(pa.int8())
    if types.is_decimal(column.type):
        column = _of_decimals(column, name, table)
    kind = column.type
    if types.is_integer(kind) and column.null_count:
        filled = column.fill_null(0).to_numpy(zero_copy_only=False)
        if not filled.size or max(abs(int(filled.max())), abs(int(filled.min()))) > EXACT:
            raise DataError(f"column {name!r} of {table} is empty in row {_empty(column)}; a number is expected")
        column = column.cast(pa.float64())
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind):
        return column.to_numpy(zero_copy_only=False)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        if column.null_count:
            raise DataError(f"column {name!r} of {table} is empty in row {_empty(column)}; text is expected")
        return np.array(column.to_pylist(), object)
    if types.is_list(kind) or types.is_fixed_size_list(kind) or types.is_large_list(kind):
        if column.null_count:
            raise DataError(f"column {name!r} of {table} is empty in row {_empty(column)}; a list is expected")
        try:
            values = np.array(column.to_pylist())
        except ValueError as error:
            raise DataError(
                f"column {name!r} of {table} has lists of several lengths; one length is expected"
            ) from error
        empty = values.dtype == object and any(cell is None for cell in values.flat)
        numbers = types.is_integer(kind.value_type) or types.is_floating(kind.value_type)
        return to_device_dtype(name, values.astype(np.float32) if empty and numbers else values)
    return None


def _of_decimals(column: Any, name: str, table: str) -> Any:
    """Convert decimals without fractional digits to int64, so that they are checked as integers, others to float64.

    Raises `DataError` for a decimal beyond 64 bits.
    """
    import pyarrow as pa

    if column.type.scale > 0:
        return column.cast(pa.float64())
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        raise DataError(f"column {name!r} of {table} has decimals beyond 64 bits; scale it, or leave it out") from None


def _empty(column: Any) -> int:
    """The number of the first row without a value."""
    return next(i for i, cell in enumerate(column) if not cell.is_valid)

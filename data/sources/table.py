"""Tables, in memory: CSV and Parquet files by pyarrow, and data frames of any library that speaks Arrow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.features import Feature, infer, narrow
from sapwood.data.images import is_picture
from sapwood.data.pictures import Pictures
from sapwood.data.source import ArraySource
from sapwood.data.sources.labels import Classes, encode


class Table(ArraySource):
    """Rows of a table. Numeric columns together are "features", float32 `(columns,)`; the target column is "label";
    a column of lists of one length, and one of text or pictures, stays an entry of its own; `weight` names the column
    of weights.

    The target is the column named by `target`, else the one called "label" or "target", else there is none.
    """

    def __init__(self, table: Any, name: str, target: str | None, classes: Classes, weight: str | None, pictures: Any):
        self.name = name
        columns = {n: _column(table.column(n).combine_chunks(), n, name) for n in table.column_names}
        target = target or next((n for n in ("label", "target") if n in columns), None)
        for role, column in (("target", target), ("weight", weight)):
            if column is not None and column not in columns:
                there = ", ".join(map(repr, columns))
                raise ConfigError(f"{name} has no column {column!r} for {role}=; it has {there}")
        if classes is not None and target is None:
            raise ConfigError(
                f"classes describe a label; name its column with target=: {', '.join(map(repr, columns))}"
            )
        if target not in (None, "label") and weight != "label":
            columns.pop("label", None)  # the target takes its place
        numeric = [n for n, c in columns.items() if c.ndim == 1 and c.dtype != object and n not in (target, weight)]
        arrays: dict[str, np.ndarray | Pictures] = {}
        features: dict[str, Feature] = {}
        for entry, cells in pictures.items():
            arrays[entry] = Pictures(cells, lambda index, entry=entry: f"{entry} of {self.where(index)}")
            features[entry] = arrays[entry].feature
        if numeric:
            arrays["features"] = np.stack([columns[n].astype(np.float32) for n in numeric], 1)
            features["features"] = Feature((len(numeric),), "float32", columns=tuple(numeric))
        for name, column in columns.items():
            if name not in (target, weight, *numeric):
                arrays[name], features[name] = column, infer(column)
        if target is not None:
            arrays["label"], features["label"] = encode(columns[target], classes)
        if weight is not None:
            arrays["weight"] = columns[weight].astype(np.float32)
            features["weight"] = Feature((), "float32", low=0)
        super().__init__(arrays, features)

    def where(self, index: int) -> str:
        if self.name.lower().endswith((".csv", ".tsv")):
            return f"example {index} (line {index + 2} of {self.name})"
        return f"example {index} (row {index} of {self.name})"


def from_file(path: Path, target: str | None, classes: Classes, weight: str | None) -> Table:
    """The rows of a CSV, TSV or Parquet file."""
    import pyarrow as pa

    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            from pyarrow import csv

            delimiter = "\t" if kind == ".tsv" else ","
            table = csv.read_csv(path, parse_options=csv.ParseOptions(delimiter=delimiter))
        else:
            from pyarrow import parquet

            table = parquet.read_table(path)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as {kind[1:]}: {str(error).splitlines()[0]}") from error
    return from_table(table, path.name, target, classes, weight)


def is_frame(value: Any) -> bool:
    """Whether `value` is a data frame, or a pyarrow table: it has columns, and types or Arrow's stream."""
    kind = type(value)
    return hasattr(kind, "columns") and (hasattr(kind, "__arrow_c_stream__") or hasattr(kind, "dtypes"))


def from_frame(frame: Any, target: str | None, classes: Classes, weight: str | None) -> Table:
    """The rows of a data frame, of pandas' without its index, or of a pyarrow table."""
    import pyarrow as pa

    pictures = {}
    if any(c.__module__.split(".")[0] == "pandas" for c in type(frame).__mro__):
        kinds = frame.dtypes.items() if len(frame) else ()
        seen = [n for n, kind in kinds if kind.kind == "O" and is_picture(frame[n].iloc[0])]
        pictures = {n: list(frame[n]) for n in seen}
        rest = frame.drop(columns=seen)
        table = pa.Table.from_pandas(rest, preserve_index=False) if len(rest.columns) else pa.table({})
    elif hasattr(frame, "__arrow_c_stream__"):
        table = pa.table(frame)
    else:
        kind = f"{type(frame).__module__.split('.')[0]} {type(frame).__name__}"
        raise DataError(
            f"a {kind} cannot be read as it is; compute(), collect() or to_pandas() makes it a frame in memory"
        )
    name = "the table" if isinstance(frame, pa.Table | pa.RecordBatch) else "the data frame"
    return from_table(table, name, target, classes, weight, pictures)


def from_table(
    table: Any, name: str, target: str | None, classes: Classes, weight: str | None, pictures: Mapping[str, Any] = {}
) -> Table:
    """The rows of a pyarrow table, and beside them columns of pictures."""
    if not table.num_rows and not pictures:
        raise DataError(f"{name} has no rows; at least one example is needed")
    if len(set(table.column_names)) != table.num_columns:
        raise DataError(f"{name} has two columns of one name: {', '.join(map(repr, table.column_names))}")
    encoded = [n for n in table.column_names if _is_encoded(table.schema.field(n).type)]
    pictures = {**pictures, **{n: table.column(n) for n in encoded}}
    return Table(table.drop_columns(encoded), name, target, classes, weight, pictures)


def _is_encoded(kind: Any) -> bool:
    """Whether a column holds pictures as the Parquet files of Hugging Face do: their bytes, or where they lie."""
    import pyarrow as pa

    return pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}


def _column(column: Any, name: str, table: str) -> np.ndarray:
    """A pyarrow array as numbers or text; empty cells of numbers are NaN, so that the check names them."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        names = column.dictionary
        column = (names.cast(pa.large_string()) if pa.types.is_string_view(names.type) else names).take(column.indices)
        kind = column.type
    if pa.types.is_integer(kind) and column.null_count:
        column = column.cast(pa.float64())
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return narrow(name, column.to_numpy(zero_copy_only=False))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        if column.null_count:
            row = next(i for i, v in enumerate(column) if not v.is_valid)
            raise DataError(f"column {name!r} of {table} is empty in row {row}; text is expected")
        return np.array(column.to_pylist(), object)
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind):
        try:
            return narrow(name, np.array(column.to_pylist()))
        except ValueError as error:
            raise DataError(
                f"column {name!r} of {table} has lists of several lengths; one length is expected"
            ) from error
    raise DataError(f"column {name!r} of {table} is of type {kind}; numbers, text or lists of numbers are expected")

"""Tables, in memory: CSV and Parquet files by pyarrow, pyarrow's own tables and pandas' data frames."""

from pathlib import Path
from typing import Any

import numpy as np

from sapwood.core.errors import ConfigError, DataError
from sapwood.data.features import Feature, infer, narrow
from sapwood.data.source import ArraySource
from sapwood.data.sources.labels import Classes, encode


class Table(ArraySource):
    """Rows of a table. Numeric columns together are "features", float32 `(columns,)`; the target column is "label";
    a column of lists of one length, and one of text, stays an entry of its own; `weight` names the column of weights.

    The target is the column named by `target`, else the one called "label" or "target", else there is none.
    """

    def __init__(self, table: Any, name: str, target: str | None, classes: Classes, weight: str | None):
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
        arrays: dict[str, np.ndarray] = {}
        features: dict[str, Feature] = {}
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


def from_frame(frame: Any, target: str | None, classes: Classes, weight: str | None) -> Table:
    """The rows of a pandas data frame; its index is left out."""
    import pyarrow as pa

    return from_table(pa.Table.from_pandas(frame, preserve_index=False), "the data frame", target, classes, weight)


def from_table(table: Any, name: str, target: str | None, classes: Classes, weight: str | None) -> Table:
    """The rows of a pyarrow table."""
    if not table.num_rows:
        raise DataError(f"{name} has no rows; at least one example is needed")
    if len(set(table.column_names)) != table.num_columns:
        raise DataError(f"{name} has two columns of one name: {', '.join(map(repr, table.column_names))}")
    return Table(table, name, target, classes, weight)


def _column(column: Any, name: str, table: str) -> np.ndarray:
    """A pyarrow array as numbers or text; empty cells of numbers are NaN, so that the check names them."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_integer(kind) and column.null_count:
        column = column.cast(pa.float64())
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return narrow(name, column.to_numpy(zero_copy_only=False))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
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

"""The column of a dataset that is read as text, and its values as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice

import pyarrow as pa
from datasets import Dataset, IterableDataset, Json, Value

from gaudi_lm.errors import UserError

SAMPLE = 100  # rows that tell which column holds words


def spell(value: object) -> str:
    """A value as text: numbers and booleans as JSON writes them, a missing value as an empty text.

    Raises:
        TypeError: a list, an object or bytes.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, dict, bytes)):
        raise TypeError(type(value).__name__)
    return json.dumps(value, default=str).strip('"')


def values_of(table: pa.Table, column: str, keep_nulls: bool = False) -> list:
    """The values of a column as Python objects, those of JSON at any depth decoded.

    `datasets` decodes JSON by a library that reads 1.36 as 1.3599999999999999 and refuses 2^64.

    Args:
        keep_nulls: of Arrow's objects, each of which has the keys of all others; what JSON says is null stays anyway.
    """
    kind, values = table.schema.field(column).type, table.column(column).to_pylist()
    changed = holds(kind, _is_json) or (not keep_nulls and holds(kind, pa.types.is_struct))
    return [_decoded(kind, value, keep_nulls) for value in values] if changed else values


def holds(kind: pa.DataType, wanted: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type, or one within it, is ``wanted``."""
    parts = [kind.field(index).type for index in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    return wanted(kind) or any(holds(part, wanted) for part in parts)


def _is_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.JsonType)


def _decoded(kind: pa.DataType, value, keep_nulls: bool):
    if isinstance(value, list) and not pa.types.is_map(kind):
        return [_decoded(kind.value_type, part, keep_nulls) for part in value]
    if isinstance(value, dict):
        there = [(name, part) for name, part in value.items() if keep_nulls or part is not None]
        return {name: _decoded(kind.field(name).type, part, keep_nulls) for name, part in there}
    return json.loads(value) if _is_json(kind) and value is not None else value


def texts_of(table: pa.Table, column: str) -> list[str]:
    """The texts of a column that :func:`text_column` has found."""
    return list(map(spell, values_of(table, column)))


def batches_of_text(dataset: Dataset | IterableDataset, column: str, size: int = 1000) -> Iterator[list[str]]:
    """Texts in lists of at most ``size``; a missing text counts as an empty one.

    Raises:
        UserError: a value that is not text, with its row, or a line that cannot be read.
    """
    row, batches = 0, iter(dataset.iter(batch_size=size))
    while True:
        try:
            batch = next(batches, None)
        except (ValueError, pa.ArrowException) as error:  # of datasets, about a file of the hub
            why = " ".join(str(error).split())
            raise UserError(f"the stream cannot be read on after row {row} ({why[:300]})") from error
        if batch is None:
            return
        texts = []
        # A stream of JSON has in a batch the keys that its rows have.
        for value in batch.get(column) or [None] * len(next(iter(batch.values()), ())):
            row += 1
            try:
                texts.append(spell(value))
            except TypeError as error:
                raise UserError(f"column {column!r}, row {row}: a {error}, not text") from error
        yield texts


def text_column(dataset: Dataset | IterableDataset, name: str | None) -> str:
    """The column to read: ``--text_column_name`` if given, else ``text``, else the first that holds words.

    Raises:
        UserError: there is no such column, or it does not hold text.
    """
    if isinstance(dataset, Dataset):
        head = dataset.with_format("arrow")[:SAMPLE]
        sample = {column: values_of(head, column) for column in dataset.column_names}
    else:
        try:
            rows = list(islice(dataset, SAMPLE))
        except (ValueError, pa.ArrowException) as error:  # of datasets, about a file of the hub or of a folder
            raise UserError(f"the stream cannot be read ({' '.join(str(error).split())[:300]})") from error
        columns = dataset.column_names or dict.fromkeys(column for row in rows for column in row)
        sample = {column: [row.get(column) for row in rows] for column in columns}
    if not sample:
        raise UserError("the dataset has no columns, or no rows")
    if name is not None and name not in sample:
        raise UserError(f"--text_column_name {name}: no such column; there are {', '.join(sample)}")
    column = name or ("text" if "text" in sample else None)
    column = column or next((column for column, values in sample.items() if any(map(_is_word, values))), None)
    there = f"--text_column_name takes one of {', '.join(sample)}"
    if column is None:
        raise UserError(f"no column is named text, and none of {', '.join(sample)} holds words; {there}")
    feature = dataset.features[column] if dataset.features is not None else Value("string")
    if isinstance(feature, Value) and "binary" not in feature.dtype:
        return column
    for row, value in enumerate(_all_values(dataset, column), 1):
        if isinstance(value, (list, dict, bytes)) or not isinstance(feature, (Value, Json)):
            raise UserError(f"column {column!r}, row {row}: {type(value).__name__}, not text; {there}")
    return column


def _all_values(dataset: Dataset | IterableDataset, column: str) -> Iterator:
    if not isinstance(dataset, Dataset):
        yield from (row[column] for row in islice(dataset, SAMPLE))
        return
    for table in dataset.with_format("arrow").iter(1000):
        yield from values_of(table, column)


def _is_word(value: object) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False

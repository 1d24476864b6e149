"""Text, JSON, csv and parquet files to datasets, whatever each of their parts looks like.

A column need not be in every file, nor in the first megabytes, and may hold values of several kinds: such a column is
kept as JSON, and only who uses it needs to mind.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, Features, IterableDataset, Json, Value
from datasets.exceptions import DatasetGenerationError
from datasets.table import table_cast

from gaudi_lm.data.builder import FilesBuilder
from gaudi_lm.data.columns import values_of
from gaudi_lm.data.files import bad_line, csv_format, open_bytes
from gaudi_lm.data.fingerprints import fingerprint
from gaudi_lm.data.json_lines import json_blocks, json_table, parse_lines
from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

BLOCK = 2**23  # bytes that are read at a time
ROWS = 10_000  # of csv and parquet files, at a time


@dataclass(frozen=True)
class FileSet:
    """The files of a split, of one ``kind`` (``text``, ``json``, ``csv``, ``parquet`` or ``arrow``), and how they are
    read.

    Attributes:
        delimiter: of csv files; None recognises it.
    """

    kind: str
    paths: tuple[str, ...]
    keep_linebreaks: bool = True
    delimiter: str | None = None

    def tables(self, path: str) -> Iterator[pa.Table]:
        """The rows of a file in tables, each of the types that its own rows have; columns may be missing.

        Raises:
            UserError: a place that cannot be read, by its line where it has one.
        """
        if self.kind == "json":
            return (json_table(*block) for block in json_blocks(path))
        if self.kind == "csv":
            return _csv_tables(path, *csv_format(path, self.delimiter))
        if self.kind in ("parquet", "arrow"):
            return map(_plain_table, _parquet_batches(path) if self.kind == "parquet" else _arrow_batches(path))
        return _text_tables(path, self.keep_linebreaks)

    def features(self) -> Features:
        """The columns of all files and the types that hold all their values. This reads JSON files to their ends."""
        if self.kind == "text":
            return Features({"text": Value("string")})
        types: dict[str, set[pa.DataType]] = {}
        files: dict[str, list[str]] = {}
        for path in self.paths:
            names: dict[str, None] = {}
            for table in self.tables(path):
                for field in table.schema:
                    types.setdefault(field.name, set()).add(field.type)
                    names[field.name] = None
                if self.kind != "json":
                    break  # all tables of the file have the same columns
            for name in names:
                files.setdefault(name, []).append(path)
        for name, there in files.items():
            if len(there) < len(self.paths):
                lacks = next(path for path, having in zip_longest(self.paths, there) if path != having)
                logger.warning(
                    "%s has no column %r, which %s has: its rows have no value there", lacks, name, there[0]
                )
        found = {name: _common_feature(kinds) for name, kinds in types.items()}
        return Features({name: feature for name, feature in found.items() if feature is not None})

    def fitting_tables(self, path: str, features: Features) -> Iterator[pa.Table]:
        """The tables of a file with exactly these columns."""
        schema = features.arrow_schema
        for table in self.tables(path):
            columns = {}
            for name, feature in features.items():
                if name not in table.column_names:
                    columns[name] = pa.nulls(len(table), schema.field(name).type)
                else:
                    columns[name] = _as_json(table, name) if feature == Json() else table.column(name)
            yield table_cast(pa.table(columns), schema)

    def rows(self, path: str) -> Iterator[dict[str, Any]]:
        """The rows of a file, one after the other; values of a JSON file are what they are."""
        if self.kind == "json":
            for block in json_blocks(path):
                yield from parse_lines(*block)
        else:
            for table in self.tables(path):
                columns = [values_of(table, name, keep_nulls=True) for name in table.column_names]
                yield from (dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True))


def _text_tables(path: str, keep_linebreaks: bool) -> Iterator[pa.Table]:
    with open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as lines:
        try:
            while text := lines.read(BLOCK):
                rows = io.StringIO(text + lines.readline()).readlines()
                yield pa.table({"text": rows if keep_linebreaks else [row.rstrip("\n") for row in rows]})
        except UnicodeDecodeError as error:
            raise UserError(bad_line(path) or f"{path}: not UTF-8 text ({error.reason})") from error


def _csv_tables(path: str, delimiter: str, skipped: int) -> Iterator[pa.Table]:
    """All columns are text as it is written; an empty field is a missing value, the words NA and null are words."""
    options = {"sep": delimiter, "skiprows": skipped, "dtype": str, "keep_default_na": False, "na_values": [""]}
    try:
        with open_bytes(path) as file:
            frames = pandas.read_csv(file, encoding="utf-8-sig", index_col=False, chunksize=ROWS, **options)
            while (frame := _next_frame(frames)) is not None:
                yield pa.table({str(name): pa.array(frame[name], pa.string(), from_pandas=True) for name in frame})
    except UnicodeDecodeError as error:
        raise UserError(bad_line(path) or f"{path}: not UTF-8 text ({error.reason})") from error
    except pandas.errors.ParserWarning as error:
        raise UserError(
            f"{path}: cannot be read as csv (a row has more fields than the first line; texts that hold {delimiter!r} "
            "need quotes, or another --csv_delimiter)"
        ) from error
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as csv ({' '.join(str(error).split())})") from error


def _next_frame(frames: Iterator[pandas.DataFrame]) -> pandas.DataFrame | None:
    with warnings.catch_warnings():
        # A row with more fields than there are columns would lose them.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        return next(frames, None)


def _parquet_batches(path: str) -> Iterator[pa.RecordBatch]:
    try:
        with open_bytes(path) as file:
            source = pa.PythonFile(file) if path.endswith(".parquet") else io.BytesIO(file.read())
            yield from pyarrow.parquet.ParquetFile(source).iter_batches(ROWS)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from error


def _arrow_batches(path: str) -> Iterator[pa.RecordBatch]:
    try:
        with pa.memory_map(path) as file:
            yield from pa.ipc.open_stream(file)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as rows of Arrow ({str(error).splitlines()[0]})") from error


def _plain_table(batch: pa.RecordBatch) -> pa.Table:
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        columns[name] = column.cast(_plain(column.type)) if _plain(column.type) != column.type else column
    return pa.table(columns)


def _as_json(table: pa.Table, name: str) -> pa.ChunkedArray | pa.Array:
    if isinstance(table.schema.field(name).type, pa.JsonType):
        return table.column(name)
    values = values_of(table, name)
    return pa.array(
        [None if value is None else json.dumps(value, default=_unknown_to_json) for value in values], pa.json_()
    )


def _unknown_to_json(value: Any) -> Any:
    """A date or a decimal number as text; bytes, which are none, as a list of numbers."""
    return list(value) if isinstance(value, bytes) else str(value)


def _common_feature(kinds: Iterable[pa.DataType]) -> Any:
    """The feature of a column that has these types in different tables; None if ``datasets`` has none."""
    kinds = {kind for kind in kinds if not pa.types.is_null(kind)} or {pa.string()}
    if any(isinstance(kind, pa.JsonType) for kind in kinds) or _mix_numbers(kinds):
        return Json()
    try:
        schema = pa.unify_schemas([pa.schema({"x": kind}) for kind in kinds], promote_options="permissive")
    except pa.ArrowException:
        return Json()
    try:
        return Features.from_arrow_schema(schema)["x"]
    except (ValueError, TypeError, KeyError):
        return None


def _mix_numbers(kinds: Iterable[pa.DataType]) -> bool:
    """Whether whole numbers and floats meet in a place: one type of both would write 5 as 5.0."""
    numbers = {place: whole for kind in kinds for place, whole in _numbers(kind)}
    return any(numbers[place] is not whole for kind in kinds for place, whole in _numbers(kind))


def _numbers(kind: pa.DataType, place: tuple = ()) -> Iterator[tuple[tuple, bool]]:
    """Where a type has numbers, and whether these are whole."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        yield place, pa.types.is_integer(kind)
    elif pa.types.is_nested(kind):
        for index in range(kind.num_fields):
            field = kind.field(index)
            yield from _numbers(field.type, (*place, field.name))


def _plain(kind: pa.DataType) -> pa.DataType:
    """A type that ``datasets`` knows, for one of parquet that it does not."""
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct(
            [(kind.field(index).name, _plain(kind.field(index).type)) for index in range(kind.num_fields)]
        )
    return kind


def read_files(files: FileSet, cache_dir: str | None) -> Dataset:
    """The rows of the files as one dataset, cached until a file, its reading or a library of it changes.

    Raises:
        UserError: what :meth:`FileSet.tables` raises, or a cache that cannot be written.
    """
    found = [(os.path.abspath(path), os.stat(path)) for path in files.paths]
    # What copies a file with its time of modification cannot copy that of its change.
    states = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in found]
    key = fingerprint(FileSet, files, states, pa.__version__, pandas.__version__)
    try:
        builder = FilesBuilder(cache_dir=cache_dir, files=files, config_id=key)
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise
        raise UserError(
            f"the data cannot be cached ({error.strerror}: {error.filename}): set HF_HOME or --cache_dir to a folder "
            "that can be written"
        ) from error
    return builder.as_dataset("train")


def stream_files(files: FileSet) -> IterableDataset:
    """The rows of the files as a stream with one shard a file."""
    return IterableDataset.from_generator(_rows, gen_kwargs={"paths": list(files.paths), "files": files})


def _rows(paths: list[str], files: FileSet) -> Iterator[dict]:
    for path in paths:
        yield from files.rows(path)

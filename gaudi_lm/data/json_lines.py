"""JSON files, of one object a line or of one value, as rows and as Arrow tables."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from gaudi_lm.data.columns import holds
from gaudi_lm.data.conversations import is_conversation
from gaudi_lm.data.files import bad_line, endings, open_bytes
from gaudi_lm.errors import UserError

BLOCK = 2**23  # bytes that are read at a time
HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # of the two that write one character, or alone
ROWS = 10_000  # of a file that is one value, at a time


def json_blocks(path: str) -> Iterator[tuple[str, int, bytes]]:
    """JSON lines in blocks of megabytes: path, number of the first line, bytes. One JSON value is made into lines."""
    number = 1
    with open_bytes(path) as file:
        block = file.read(BLOCK).removeprefix(b"\xef\xbb\xbf")
        one_value = block.lstrip()[:1] == b"[" or not _is_row(block.lstrip().split(b"\n", 1)[0])
        block, more = block + file.readline(), file.read(-1 if one_value else BLOCK)
        # JSON lines of a single row have the ending jsonl.
        if one_value or (endings(path)[-1:] == ["json"] and not more and b"\n" not in block.strip()):
            lines = _lines_of_value(path, block + more)
            for first in range(0, len(lines), ROWS):
                yield path, first + 1, b"\n".join(lines[first : first + ROWS])
            return
        while block:
            yield path, number, block
            number += block.count(b"\n")
            block, more = more + file.readline(), file.read(BLOCK)


def _is_row(line: bytes) -> bool:
    """Whether a line may be one of JSON lines, not the beginning of a value that goes over several lines."""
    return line.rstrip().endswith(b"}") or len(line) >= BLOCK or not line.startswith(b"{")


def _lines_of_value(path: str, content: bytes) -> list[bytes]:
    """The rows of a file that is one JSON value: a list of objects or texts, or an object that holds such a list."""
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise UserError(bad_line(path) or f"{path}: not UTF-8 text ({error.reason})") from error
    if isinstance(value, dict):
        lists = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
        is_row = "text" in value or any(map(is_conversation, lists))
        value = lists[0] if len(lists) == 1 and not is_row else [value]
    rows = [{"text": row} if isinstance(row, str) else row for row in value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f'{path}, row {number}: a {type(row).__name__}, not an object such as {{"text": ...}}')
    return [json.dumps(row).encode() for row in rows]


def parse_lines(path: str, number: int, block: bytes) -> list[dict]:
    """The objects of JSON lines.

    Raises:
        UserError: a line that is none, by its number.
    """
    rows = []
    for line, content in enumerate(block.split(b"\n"), number):
        if not content.strip():
            continue
        try:
            row = json.loads(content.decode("utf-8"))
            if HALF_CHARACTER.search(content):
                row = _whole_characters(row)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason})") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {line}: not valid JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {line}: a {type(row).__name__}, not an object such as {{"text": ...}}')
        rows.append(row)
    return rows


def _whole_characters(value: object) -> object:
    """A value of JSON without halves of characters, which cut texts end with and which are not text."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return list(map(_whole_characters, value))
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(part) for key, part in value.items()}
    return value


def json_table(path: str, number: int, block: bytes) -> pa.Table:
    """JSON lines as a table; a column whose values no Arrow type holds as they are is JSON.

    Raises:
        UserError: what :func:`parse_lines` raises.
    """
    one_chunk = pyarrow.json.ReadOptions(block_size=len(block) + 1)
    try:
        block.decode("utf-8")  # which pyarrow takes for granted
        table = pyarrow.json.read_json(io.BytesIO(block), read_options=one_chunk)
        kept = {name: table.column(name) for name in table.column_names if not _is_guessed(table.column(name))}
        if len(kept) == table.num_columns:
            return table
    except (UnicodeDecodeError, pa.ArrowException):
        kept = {}  # a line that is no object, or values of several kinds in a column: Python tells them apart
    rows = parse_lines(path, number, block)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: kept[name] if name in kept else _column([row.get(name) for row in rows]) for name in names})


def _is_guessed(column: pa.ChunkedArray | pa.Array) -> bool:
    """Whether pyarrow may not have read values as they were written: texts as points in time, 5 as 5.0."""
    if pa.types.is_floating(column.type):
        return bool(pc.any(pc.equal(pc.floor(column), column)).as_py())
    if pa.types.is_struct(column.type):
        return any(map(_is_guessed, column.flatten()))
    if pa.types.is_list(column.type):
        return _is_guessed(pc.list_flatten(column))
    return pa.types.is_temporal(column.type)


def _column(values: list) -> pa.Array:
    try:
        column = pa.array(values)
        if not (holds(column.type, pa.types.is_floating) and any(map(_is_widened, values, column.to_pylist()))):
            return column
    except (pa.ArrowException, OverflowError, TypeError):
        pass
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.json_())


def _is_widened(value: Any, kept: Any) -> bool:
    """Whether a whole number was made a float, as pyarrow does where a column has both."""
    if isinstance(kept, dict):
        return any(_is_widened(part, kept[name]) for name, part in value.items())
    if isinstance(kept, list):
        return any(map(_is_widened, value, kept))
    return isinstance(value, int) and isinstance(kept, float)

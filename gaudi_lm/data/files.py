"""Files that people bring: which they are, of what kind, and whether they can be read at all."""

from __future__ import annotations

import glob
import gzip
import io
import re
import zlib
from pathlib import Path

import pyarrow as pa

from gaudi_lm.errors import UserError

KINDS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "txt": "text", "parquet": "parquet"}
COMPRESSED = (".gz", ".zst")
DELIMITERS = (",", "\t", ";")  # that are recognised by a file's first line
SEPARATOR = re.compile(r"sep=(.)\r?\n")  # Excel's own line before the first, which tells the delimiter
QUOTED = re.compile(r'(^|[,\t;\n])"(?:[^"]|"")*"')  # a field that may hold any of them


def endings(path: str) -> list[str]:
    endings = path.lower().rsplit("/", 1)[-1].split(".")[1:]
    return endings[:-1] if endings and f".{endings[-1]}" in COMPRESSED else endings


def kind_of(path: str) -> str | None:
    """``csv``, ``json``, ``text`` or ``parquet``, by a file's name; None where it is none of them."""
    return KINDS.get((endings(path) or [""])[-1])


def _kind(flag: str, path: str) -> str:
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{flag} {path}: the name must end in {', '.join(KINDS)}, also with .gz or .zst after it")
    return kind


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, .gz or .zst; a UserError tells where it is cut off or damaged."""

    def __init__(self, path: str):
        self._path = path
        # zstandard's own reader takes a frame that is cut off for whole.
        zstd = path.lower().endswith(".zst")
        self._stream = pa.input_stream(path, compression="zstd") if zstd else gzip.open(path)  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            content = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{self._path}: compressed data are truncated or damaged ({error})") from error
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_bytes(path: str) -> io.BufferedReader:
    """Open a file for reading bytes, through its compression (.gz, .zst) if it has one."""
    if path.lower().endswith(COMPRESSED):
        return io.BufferedReader(_Decompressed(path), 1 << 16)
    return open(path, "rb")


def check_files(flag: str, pattern: str) -> tuple[str, list[str]]:
    """The kind and the sorted paths of the files that a flag names.

    Args:
        flag: ``--train_file`` or ``--validation_file``, for the messages.
        pattern: a path or a glob; what exists as it is written is a path, whatever characters it has.

    Raises:
        UserError: missing, empty, a directory, binary where text is due, an unknown ending, or kinds that differ.
    """
    is_glob = glob.has_magic(pattern) and not Path(pattern).exists()
    paths = sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]
    if not paths:
        raise UserError(f"{flag} {pattern}: no file matches")
    kinds = set()
    for path in paths:
        if Path(path).is_dir():
            raise UserError(f"{flag} {path}: is a directory; name a file or a glob such as {path.rstrip('/')}/*.txt")
        if not Path(path).is_file():
            raise UserError(f"{flag} {path}: no such file")
        kinds.add(_kind(flag, path))
        if len(kinds) > 1:
            raise UserError(f"{flag} {pattern}: files of different kinds ({', '.join(sorted(kinds))})")
        _check_content(flag, path, kinds)
    return kinds.pop(), paths


def _check_content(flag: str, path: str, kinds: set[str]) -> None:
    try:
        with open_bytes(path) as file:
            start = file.read(1 << 16)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error})") from error
    except UserError as error:
        raise UserError(f"{flag} {error}") from error
    if not start.strip():
        raise UserError(f"{flag} {path}: the file is empty")
    if "parquet" in kinds:
        if not start.startswith(b"PAR1"):
            raise UserError(f"{flag} {path}: not a parquet file")
    elif b"\0" in start:
        kind = "UTF-16; convert it to UTF-8" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "a binary file, not text"
        raise UserError(f"{flag} {path}: {kind}")


def bad_line(path: str) -> str | None:
    """The first line of a file that is not UTF-8, as ``file, line N: why``."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"{path}, line {number}: not UTF-8 text ({error.reason})"
    return None


def csv_format(path: str, given: str | None = None) -> tuple[str, int]:
    """What separates the fields of a csv or tsv file: ``--csv_delimiter``, or a tab in a .tsv, or by the first line;
    and how many lines stand before the names of its columns: one where Excel tells the delimiter, as ``sep=;``.

    Raises:
        UserError: ``--csv_delimiter`` is not a single character.
    """
    with open_bytes(path) as file:
        start = file.read(1 << 16).lstrip().decode("utf-8", "replace").removeprefix("\ufeff")
    told = SEPARATOR.match(start)
    if given is not None:
        delimiter = {"\\t": "\t", "tab": "\t"}.get(given, given)
        if len(delimiter) != 1 or delimiter in '"\r\n':
            raise UserError(f"--csv_delimiter {given!r}: one character, such as ';', or \\t for a tab")
        return delimiter, int(told is not None)
    if told:
        return told[1], 1
    if endings(path)[-1] == "tsv":
        return "\t", 0
    first = QUOTED.sub(r"\1", start).split("\n", 1)[0]
    return max(DELIMITERS, key=first.count), 0

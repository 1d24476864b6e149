"""Raw data: from the hub or from files, split, checked, streamed or not."""

from __future__ import annotations

import glob
import gzip
import json
import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from .arguments import DataArguments, ModelArguments
from .memory import forget_mapped_pages
from .runtime import UserError

logger = logging.getLogger("gaudi_lm")

KINDS = {"csv": "csv", "json": "json", "jsonl": "json", "txt": "text", "parquet": "parquet"}
COMPRESSED = ("gz", "zst")


def _kind(flag: str, path: str) -> str:
    parts = path.lower().rsplit("/", 1)[-1].split(".")[1:]
    if parts and parts[-1] in COMPRESSED:
        parts.pop()
    if not parts or parts[-1] not in KINDS:
        raise UserError(f"{flag} {path}: the name must end in {', '.join(KINDS)}, also with .gz or .zst after it")
    return KINDS[parts[-1]]


def open_bytes(path: str):
    """Open a file for reading bytes, through its compression (.gz, .zst) if it has one."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        import zstandard

        return zstandard.open(path, "rb")
    return open(path, "rb")


def check_files(flag: str, pattern: str) -> tuple[str, list[str]]:
    """The kind and the sorted paths of the files that a flag names.

    Args:
        flag: ``--train_file`` or ``--validation_file``, for the messages.
        pattern: a path or a glob.

    Raises:
        UserError: missing, empty, a directory, binary where text is due, an unknown ending, or kinds that differ.
    """
    paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) and not Path(pattern).exists() else [pattern]
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
        try:
            with open_bytes(path) as file:
                start = file.read(1 << 16)
        except (OSError, EOFError) as error:
            raise UserError(f"{flag} {path}: cannot be read ({error})") from error
        except Exception as error:  # zstandard has an exception class of its own
            raise UserError(f"{flag} {path}: damaged compression ({error})") from error
        if not start.strip():
            raise UserError(f"{flag} {path}: the file is empty")
        if "parquet" in kinds:
            if not start.startswith(b"PAR1"):
                raise UserError(f"{flag} {path}: not a parquet file")
        elif b"\0" in start:
            raise UserError(f"{flag} {path}: a binary file, not text")
    return kinds.pop(), paths


def _find_bad_row(paths: list[str], kind: str, column: str | None) -> str | None:
    """The first place in JSON or text files that cannot be read, as ``file, line N: why``."""
    for path in paths:
        with open_bytes(path) as file:
            if kind == "json" and path.split(".gz")[0].split(".zst")[0].endswith(".json"):
                text = file.read()
                if text.lstrip()[:1] == b"[":
                    try:
                        json.loads(text)
                    except json.JSONDecodeError as error:
                        return f"{path}, line {error.lineno}: not valid JSON ({error.msg})"
                    continue
                file = text.splitlines(keepends=True)
            types: dict[str, type] = {}
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    return f"{path}, line {number}: not UTF-8 text ({error.reason})"
                if kind != "json" or not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    return f"{path}, line {number}: not valid JSON ({error.msg})"
                if not isinstance(row, dict):
                    return f'{path}, line {number}: a {type(row).__name__}, not an object such as {{"text": ...}}'
                for key, value in row.items():
                    if value is not None and types.setdefault(key, type(value)) is not type(value):
                        return (
                            f"{path}, line {number}, key {key!r}: a {type(value).__name__}, "
                            f"after {types[key].__name__} in the lines before"
                        )
    return None


def _load_files(data_args: DataArguments, model_args: ModelArguments) -> DatasetDict | IterableDatasetDict:
    files, kinds = {}, {}
    for split, flag in (("train", "--train_file"), ("validation", "--validation_file")):
        pattern = getattr(data_args, f"{split}_file")
        if pattern:
            kinds[split], files[split] = check_files(flag, pattern)
    if len(set(kinds.values())) > 1:
        raise UserError(
            f"--train_file is {kinds['train']}, --validation_file {kinds['validation']}: they must be of one kind"
        )
    kind = next(iter(kinds.values()))
    options = {"keep_linebreaks": data_args.keep_linebreaks} if kind == "text" else {}
    try:
        return load_dataset(
            kind, data_files=files, cache_dir=model_args.cache_dir, streaming=data_args.streaming, **options
        )
    except (DatasetGenerationError, pa.ArrowInvalid, UnicodeDecodeError, ValueError, TypeError) as error:
        raise _unreadable(files, kind, error) from error


def _unreadable(files: dict[str, list[str]], kind: str, error: BaseException) -> UserError:
    paths = list(chain.from_iterable(files.values()))
    where = _find_bad_row(paths, kind, None) if kind in ("json", "text", "csv") else None
    cause = error.__cause__ or error
    return UserError(where or f"{', '.join(paths)}: cannot be read as {kind} ({str(cause).splitlines()[0]})")


def _load_hub(data_args: DataArguments, model_args: ModelArguments) -> DatasetDict | IterableDatasetDict:
    try:
        return load_dataset(
            data_args.dataset_name,
            data_args.dataset_config_name,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
            streaming=data_args.streaming,
        )
    # OSError includes the network's errors, a transfer that broke off among them.
    except (DatasetNotFoundError, OSError, ValueError) as error:
        name = " ".join(filter(None, (data_args.dataset_name, data_args.dataset_config_name)))
        raise UserError(f"--dataset_name {name}: cannot be loaded ({str(error).splitlines()[0]})") from error


def load_raw(
    data_args: DataArguments,
    model_args: ModelArguments,
    need_train: bool,
    need_validation: bool,
    split_seed: int | None = None,
) -> dict[str, Dataset | IterableDataset]:
    """The splits that the run needs, under ``train`` and ``validation``.

    Without a validation split, ``--validation_split_percentage`` of the training rows become one: the first rows, or
    with ``split_seed`` rows drawn at random, or in a stream rows at even distances. Each row lands in exactly one of
    the two.

    Raises:
        UserError: nothing to read, a split that is needed and missing, or unreadable data.
    """
    raw = _load_hub(data_args, model_args) if data_args.dataset_name else _load_files(data_args, model_args)
    splits = {name: raw[name] for name in ("train", "validation") if name in raw}
    # Give back what reading and converting the files took: it grows with them.
    pa.default_memory_pool().release_unused()
    forget_mapped_pages(file["filename"] for split in splits.values() for file in getattr(split, "cache_files", ()))
    if need_train and "train" not in splits:
        raise UserError("--do_train needs --train_file, or a data set that has a split named train")
    if "validation" not in splits and data_args.validation_split_percentage and "train" in splits and need_validation:
        train, percentage = splits["train"], data_args.validation_split_percentage
        splits["train"], splits["validation"] = (
            split_rows(train, percentage, split_seed)
            if isinstance(train, Dataset)
            else split_stream(train, percentage)
        )
        logger.info(
            "no validation split: %d%% of the training rows are kept for validation",
            percentage,
        )
    if need_validation and "validation" not in splits:
        raise UserError(
            "--do_eval needs validation data: --validation_file, or --train_file and --validation_split_percentage"
        )
    needed = {"train": need_train, "validation": need_validation}
    return {name: split for name, split in splits.items() if needed[name]}


def split_rows(train: Dataset, percentage: int, seed: int | None = None) -> tuple[Dataset, Dataset]:
    """Split off a share of the rows: ``(train, validation)``, every row in exactly one of them.

    Args:
        seed: draw them at random; without it, they are the first ones.

    Raises:
        UserError: a single row cannot be split.
    """
    rows = len(train)
    if rows < 2:
        raise UserError("the training data has one row, which cannot be split: give --validation_file")
    kept = min(max(1, round(rows * percentage / 100)), rows - 1)
    order = np.arange(rows) if seed is None else np.random.default_rng(seed).permutation(rows)
    return train.select(np.sort(order[kept:])), train.select(np.sort(order[:kept]))


SHARD_PHASE = 61  # near 100 times the golden ratio: validation rows of many short shards are spread evenly


def split_stream(stream: IterableDataset, percentage: int) -> tuple[IterableDataset, IterableDataset]:
    """Split off ``percentage`` of every hundred rows: ``(train, validation)``, every row in exactly one of them.

    A row's split depends on its shard and its place there: whoever reads a shard, alone or with others, finds the
    same. Both results have the shards of ``stream``, so that they can be dealt out to ranks.
    """

    def part(validation: bool) -> IterableDataset:
        return IterableDataset.from_generator(
            _rows_of_split,
            features=stream.features,
            gen_kwargs={
                "shards": list(range(stream.num_shards)),  # a list is what datasets deals out
                "stream": stream,
                "percentage": percentage,
                "validation": validation,
            },
        )

    return part(False), part(True)


def _rows_of_split(shards: list[int], stream: IterableDataset, percentage: int, validation: bool) -> Iterator[dict]:
    for shard in shards:
        phase = shard * SHARD_PHASE
        for index, row in enumerate(stream.shard(stream.num_shards, shard)):
            if ((phase + index * percentage) % 100 < percentage) is validation:
                yield row


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns of a data set; of a stream whose features are unknown, those of its first row.

    Raises:
        UserError: an empty stream.
    """
    if dataset.column_names is not None:
        return list(dataset.column_names)
    row = next(iter(dataset), None)
    if row is None:
        raise UserError("the data set has no rows")
    return list(row)


def text_column(dataset: Dataset | IterableDataset, name: str | None) -> str:
    """The column to read: ``--text_column_name`` if given, else ``text``, else the first.

    Raises:
        UserError: there is no such column, or it does not hold text.
    """
    columns = column_names(dataset)
    if name is not None and name not in columns:
        raise UserError(f"--text_column_name {name}: no such column; there are {', '.join(columns)}")
    if not columns:
        raise UserError("the data set has no columns")
    column = name or ("text" if "text" in columns else columns[0])
    features: Features | None = dataset.features
    if features is not None:
        feature = features[column]
        if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string", "null")):
            values = enumerate((row[column] for row in dataset), 1)
            others = ((row, value) for row, value in values if value is not None and not isinstance(value, str))
            row, value = next(others, (1, None))
            raise UserError(
                f"column {column!r}, row {row}: {type(value).__name__}, not text; "
                f"--text_column_name takes one of {', '.join(columns)}"
            )
    return column

"""Raw data: from the hub or from files, split, checked, streamed or not."""

from __future__ import annotations

import glob
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import (
    BuilderConfig,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import FILES_TO_IGNORE, SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from gaudi_lm.arguments.definitions import DataArguments, ModelArguments
from gaudi_lm.arguments.model_files import hub_refusal
from gaudi_lm.data.files import check_files, kind_of
from gaudi_lm.data.memory import forget_mapped_pages
from gaudi_lm.data.readers import FileSet, read_files, stream_files
from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

SAVED = ("dataset_info.json", "state.json")  # that `save_to_disk` of `datasets` writes beside the rows of a split


def _load_files(flag: str, data_args: DataArguments, model_args: ModelArguments) -> Dataset | IterableDataset:
    pattern = getattr(data_args, flag.removeprefix("--"))
    kind, paths = check_files(flag, pattern)
    if data_args.csv_delimiter is not None and kind != "csv":
        raise UserError(f"--csv_delimiter: {flag} {pattern} is not a csv or tsv file")
    files = FileSet(kind, tuple(paths), data_args.keep_linebreaks, data_args.csv_delimiter)
    return _read(files, data_args, model_args)


def _read(files: FileSet, data_args: DataArguments, model_args: ModelArguments) -> Dataset | IterableDataset:
    return stream_files(files) if data_args.streaming else read_files(files, model_args.cache_dir)


def _load_hub(data_args: DataArguments, model_args: ModelArguments) -> DatasetDict | IterableDatasetDict | dict:
    folder = Path(data_args.dataset_name or "")
    if kind_of(str(folder)) and folder.is_file():
        raise UserError(f"--dataset_name {data_args.dataset_name}: is a file; give it by --train_file")
    if saved := _saved_splits(folder):  # of no rows there is no file
        return {split: _read(files, data_args, model_args) for split, files in saved.items() if files.paths}
    source = {"path": data_args.dataset_name, "name": data_args.dataset_config_name, "token": model_args.token}
    try:
        if folder.is_dir():
            config = load_dataset_builder(**source, cache_dir=model_args.cache_dir).config
            _name_files_left_out(folder, config)
            files = {split: _files_of_folder(config, split, data_args) for split in ("train", "validation")}
            if any(files.values()):
                return {split: _read(own, data_args, model_args) for split, own in files.items() if own}
        return load_dataset(**source, cache_dir=model_args.cache_dir, streaming=data_args.streaming)
    # OSError includes the network's errors, a transfer that broke off among them.
    except (DatasetNotFoundError, DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        name = " ".join(filter(None, (data_args.dataset_name, data_args.dataset_config_name)))
        if "scripts are no longer supported" in str(error):
            raise UserError(
                f"--dataset_name {name}: it is a script, which `datasets` runs no more; "
                "write its rows into json or parquet files, and give those by --train_file"
            ) from error
        cause = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"--dataset_name {name}: cannot be loaded ({hub_refusal(cause) or cause[:300]})") from error


def _saved_splits(folder: Path) -> dict[str, FileSet]:
    """What ``save_to_disk`` of ``datasets`` has written, rows of one split or of several; nothing in another folder.

    Files of rows that ``datasets`` has cached may stand beside those that it has saved, and are not data.
    """
    try:
        parts = {"train": folder} if all((folder / name).is_file() for name in SAVED) else {}
        if (folder / "dataset_dict.json").is_file():
            names = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
            splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            parts = {names.get(split, split): folder / split for split in splits}
        found = {}
        for split in parts.keys() & {"train", "validation"}:
            part = parts[split]
            files = json.loads((part / "state.json").read_text())["_data_files"]
            paths = [str((part / file["filename"]).resolve(strict=True)) for file in files]
            found[split] = FileSet("arrow", tuple(paths))
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--dataset_name {folder}: not whole, as `save_to_disk` writes it ({error})") from error


def _name_files_left_out(folder: Path, config: BuilderConfig) -> None:
    """Warn of data that is not read: `datasets` takes the commonest format, and file names that tell a split."""
    used = {Path(path).resolve() for paths in (config.data_files or {}).values() for path in paths}
    there = (name for name in sorted(glob.glob("**/*", root_dir=folder, recursive=True)) if kind_of(name))
    no_data = {*FILES_TO_IGNORE, *SAVED}
    left_out = [name for name in there if Path(name).name not in no_data and (folder / name).resolve() not in used]
    if left_out and config.name == "default":  # else its README may give them to another configuration
        names = ", ".join(left_out[:5] + ["..."] * (len(left_out) > 5))
        why = "another format, or a name that belongs to no split"
        logger.warning("--dataset_name %s: files that are not read (%s): %s", folder, why, names)


def _files_of_folder(config: BuilderConfig, split: str, data_args: DataArguments) -> FileSet | None:
    """The files of a split of a local dataset, where they are of one kind and nothing special."""
    paths = tuple((config.data_files or {}).get(split, ()))
    kinds: set = {kind_of(path) if Path(path).is_file() else None for path in paths}
    special = getattr(config, "field", None) or getattr(config, "sample_by", "line") != "line"
    if len(kinds) != 1 or None in kinds or special:
        return None
    separator = getattr(config, "sep", ",")
    return FileSet(kinds.pop(), paths, data_args.keep_linebreaks, None if separator == "," else separator)


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
    hub = _load_hub(data_args, model_args) if data_args.dataset_name else {}
    splits = {name: hub[name] for name in ("train", "validation") if name in hub}
    for name in ("train", "validation"):
        if getattr(data_args, f"{name}_file"):
            splits[name] = _load_files(f"--{name}_file", data_args, model_args)
    # Give back what reading and converting the files took: it grows with them.
    pa.default_memory_pool().release_unused()
    forget_mapped_pages(file["filename"] for split in splits.values() for file in getattr(split, "cache_files", ()))
    if need_train and "train" not in splits:
        raise UserError("--do_train needs --train_file, or a dataset that has a split named train")
    if "validation" not in splits and data_args.validation_split_percentage and "train" in splits and need_validation:
        train, percentage = splits["train"], data_args.validation_split_percentage
        splits["train"], splits["validation"] = (
            split_rows(train, percentage, split_seed)
            if isinstance(train, Dataset)
            else split_stream(train, percentage)
        )
        logger.info("no validation split: %d%% of the training rows are kept for validation", percentage)
        if not need_train:
            logger.warning("a run with --do_train alone has trained on these rows")
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

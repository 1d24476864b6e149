"""Reading text: every kind of file, compressed or many, streamed or not; and tokenising it once."""

import gzip
import json

import numpy as np
import pandas
import pytest
import zstandard
from transformers import AutoTokenizer

from gaudi_lm.arguments.definitions import DataArguments, ModelArguments
from gaudi_lm.data import blocks
from gaudi_lm.data.blocks import count_tokens, group_into_blocks, tokenise
from gaudi_lm.data.columns import text_column
from gaudi_lm.data.loading import load_raw
from gaudi_lm.data.streams import StreamedBlocks

LINES = [f"line {number}, of some words, and a 'quote' and \"another\"" for number in range(250)]

KINDS = ("csv", "json", "jsonl", "txt", "parquet", "csv.gz", "jsonl.gz", "txt.gz", "txt.zst", "jsonl.zst", "csv.zst")


def written(folder, kind: str, lines: list[str]):
    """The lines in a file of this kind; the kind may end in .gz or .zst."""
    base, _, compression = kind.partition(".")
    rows = pandas.DataFrame({"text": lines, "length": [len(line) for line in lines]})
    content = {
        "csv": lambda: rows.to_csv(index=False).encode(),
        "jsonl": lambda: "\n".join(json.dumps(row) for row in rows.to_dict("records")).encode(),
        "json": lambda: json.dumps(rows.to_dict("records")).encode(),
        "txt": lambda: ("\n".join(lines) + "\n").encode(),
        "parquet": lambda: rows.to_parquet(),
    }[base]()
    packed = {"": bytes, "gz": gzip.compress, "zst": zstandard.compress}[compression](content)
    path = folder / f"data.{kind}"
    path.write_bytes(packed)
    return path


def read(tmp_path, streaming: bool = False, **flags) -> dict:
    data = DataArguments(streaming=streaming, **{name: str(value) for name, value in flags.items()})
    return load_raw(data, ModelArguments(cache_dir=str(tmp_path / "cache")), "train_file" in flags, True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(tmp_path, kind, streaming):
    path = written(tmp_path, kind, LINES)
    raw = read(tmp_path, streaming, train_file=path, validation_file=path)
    ends = "\n" if kind.startswith("txt") else ""
    for split in ("train", "validation"):
        assert text_column(raw[split], None) == "text"
        assert [row["text"] for row in raw[split]] == [line + ends for line in LINES]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_glob_and_a_split(tmp_path, streaming):
    """Many files are one dataset; without a validation file, each row is in exactly one of the two splits."""
    for part in range(3):
        folder = tmp_path / f"part{part}"
        folder.mkdir()
        written(folder, "txt.gz", LINES[part::3])
    raw = read(tmp_path, streaming, train_file=tmp_path / "part*" / "data.txt.gz")
    rows = {split: [row["text"].rstrip("\n") for row in raw[split]] for split in raw}
    assert sorted(rows["train"] + rows["validation"]) == sorted(LINES)
    assert len(rows["validation"]) == (13 if streaming else 12)


@pytest.fixture(scope="module")
def tokenizer(assets):
    return AutoTokenizer.from_pretrained(assets.tokenizer)


def test_tokens_are_the_tokenizers_own(assets, tokenizer, tmp_path):
    texts = read(tmp_path, train_file=assets.train, validation_file=assets.validation)["train"]
    tokens = tokenise(texts, tokenizer, "text")
    assert tokens.column_names == ["input_ids"] and tokens.features["input_ids"].feature.dtype == "int32"
    assert tokens["input_ids"][:] == tokenizer(texts["text"][:])["input_ids"]
    assert "attention_mask" not in tokens.column_names


def test_a_cap_limits_the_work(assets, tokenizer, tmp_path):
    """With a cap, only as many rows are tokenised as the blocks need, to the next thousand."""
    lines = assets.train.read_text().splitlines() * 20
    path = tmp_path / "long.txt"
    path.write_text("\n".join(lines))
    texts = read(tmp_path, train_file=path, validation_file=assets.validation)["train"]
    assert len(texts) > 20_000
    needed = 40 * 64
    part = tokenise(texts, tokenizer, "text", max_tokens=needed)
    assert count_tokens(part) >= needed and len(part) <= 2000
    first = tokenise(texts, tokenizer, "text")["input_ids"][: len(part)]
    assert part["input_ids"][:] == first
    blocks = group_into_blocks(part, 64, max_blocks=40)
    assert np.concatenate(blocks["input_ids"][:]).tolist() == sum(first, [])[:needed]


@pytest.mark.parametrize("processes", (None, 2))
def test_letting_go_of_what_was_read_changes_nothing(assets, tokenizer, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(blocks, "MAPPED_BYTES", 0)
    path = tmp_path / "long.txt"
    path.write_text("\n".join(assets.train.read_text().splitlines() * 5))
    texts = read(tmp_path, train_file=path, validation_file=assets.validation)["train"]
    assert len(texts) > 3 * blocks.ROWS and texts.cache_files
    tokens = tokenise(texts, tokenizer, "text", num_proc=processes, use_cache=False)
    assert tokens["input_ids"][:] == tokenizer(texts["text"][:])["input_ids"]


def test_a_stream_gives_the_same_blocks(assets, tokenizer, tmp_path):
    texts = read(tmp_path, train_file=assets.train, validation_file=assets.validation)["train"]
    stream = read(tmp_path, True, train_file=assets.train, validation_file=assets.validation)["train"]
    blocks = group_into_blocks(tokenise(texts, tokenizer, "text"), 64)["input_ids"][:]
    streamed = [row["input_ids"].tolist() for row in StreamedBlocks(stream, tokenizer, "text", 64)]
    assert streamed == blocks
    endless = iter(StreamedBlocks(stream, tokenizer, "text", 64, repeat=True))
    twice = [next(endless)["input_ids"].tolist() for _ in range(2 * len(blocks))]
    flat = sum(tokenizer(texts["text"][:])["input_ids"], [])
    assert sum(twice, []) == (flat * 2)[: 2 * len(blocks) * 64], "the remainder goes on into the next round"
    assert len(list(StreamedBlocks(stream, tokenizer, "text", 64, max_rows=3))) == 3

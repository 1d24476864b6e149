"""Streams: every row in one split and on one rank, a cap for all ranks together, and passes that are not alike."""

import json
import shutil
from functools import partial
from itertools import islice

import pytest
import torch
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from running import log_history, losses, results, run, run_ranks
from transformers import AutoTokenizer, default_data_collator

from gaudi_lm.arguments.definitions import DataArguments, ModelArguments
from gaudi_lm.data.loading import load_raw, split_stream
from gaudi_lm.data.masking import MaskingCollator
from gaudi_lm.data.sampling import ignore_filler_samples
from gaudi_lm.data.streams import RepeatedRows, StreamedBlocks, StreamedLines, rank_share, stream_batches
from gaudi_lm.errors import UserError
from gaudi_lm.training.evaluation import EvaluationRows


def generate(files: list[range]):
    for numbers in files:
        yield from ({"text": f"row {number}"} for number in numbers)


def stream_of(rows: list[int]) -> IterableDataset:
    """A stream of as many shards as there are numbers; each is how many rows a shard has."""
    starts = [sum(rows[:shard]) for shard in range(len(rows))]
    files = [range(start, start + count) for start, count in zip(starts, rows, strict=True)]
    return IterableDataset.from_generator(generate, gen_kwargs={"files": files})


def texts(stream) -> list[str]:
    return [row["text"] for row in stream]


@pytest.mark.parametrize("ranks", (1, 2, 3, 4))
@pytest.mark.parametrize("shards", (1, 2, 3, 4))
@settings(max_examples=8)
@given(data=st.data(), percentage=st.integers(1, 99))
def test_each_row_in_one_split_and_on_one_rank(shards, ranks, data, percentage):
    rows = data.draw(st.lists(st.integers(0, 130), min_size=shards, max_size=shards))
    train, validation = split_stream(stream_of(rows), percentage)
    kept = texts(validation)
    seen = list(kept)
    for rank in range(ranks):
        try:
            share, _ = rank_share(train, "text", None, rank, ranks)
        except UserError:
            continue  # it has none
        seen += texts(share)
    assert sorted(seen) == sorted(f"row {number}" for number in range(sum(rows)))
    # Of each shard its share, to a row.
    assert abs(len(kept) - sum(rows) * percentage / 100) <= shards


def test_the_split_of_many_short_shards():
    """One-row files are spread over both splits, about as asked."""
    train, validation = split_stream(stream_of([1] * 200), 10)
    assert len(texts(validation)) == 20 and len(texts(train)) == 180


@pytest.mark.parametrize("ranks", (1, 2, 3, 4))
@pytest.mark.parametrize("shards", (1, 2, 3, 4))
def test_files_over_ranks(tmp_path, shards, ranks):
    """As above, from files: what is trained, what is evaluated, and nothing is lost or read twice."""
    for shard in range(shards):
        lines = (json.dumps({"text": f"row {number}"}) for number in range(shard * 30, shard * 30 + 30))
        (tmp_path / f"part{shard}.jsonl").write_text("\n".join(lines))
    data = DataArguments(train_file=f"{tmp_path}/part*.jsonl", streaming=True, validation_split_percentage=10)
    trained, evaluated = [], set()
    for rank in range(ranks):
        raw = load_raw(data, ModelArguments(cache_dir=str(tmp_path / "cache")), True, True)
        trained += texts(rank_share(raw["train"], "text", None, rank, ranks)[0])
        evaluated.add(tuple(texts(raw["validation"])))
        assert raw["train"].num_shards == shards
    assert len(evaluated) == 1, "all ranks evaluate one sequence of rows, each its own part of it"
    evaluated = evaluated.pop()
    assert sorted([*trained, *evaluated]) == sorted(f"row {number}" for number in range(shards * 30))
    assert len(evaluated) == shards * 3


@pytest.fixture(scope="module")
def tokenizer(masked_assets):
    return AutoTokenizer.from_pretrained(masked_assets.roberta)


@pytest.mark.parametrize("rows_of", (StreamedLines, partial(StreamedBlocks, add_special_tokens=False)))
@pytest.mark.parametrize("ranks", (1, 2, 3))
def test_a_cap_is_for_all_ranks_together(tokenizer, rows_of, ranks):
    """No more different rows than the cap, whatever the passes; every pass has the same ones and draws of its own."""
    cap, different = 7, []
    for rank in range(ranks):
        share, limit = rank_share(stream_of([40] * 2), "text", cap, rank, ranks)
        rows = iter(rows_of(share, tokenizer, "text", 8, repeat=True, max_rows=limit))
        passes = [[next(rows) for _ in range(limit)] for _ in range(3)]
        contents = [[row["input_ids"].tolist() for row in one] for one in passes]
        assert contents[0] == contents[1] == contents[2]
        assert [row["sample_id"] for one in passes for row in one] == list(range(3 * limit))
        different += contents[0]
    assert len(different) == len({tuple(row) for row in different}) == cap
    with pytest.raises(UserError, match="--max_train_samples 2: fewer than the 3 ranks"):
        rank_share(stream_of([40] * 2), "text", 2, 0, 3)


@pytest.mark.parametrize("cap", (None, 5, 500))
@pytest.mark.parametrize("rows_of", (StreamedLines, StreamedBlocks))
def test_masks_of_a_second_pass_are_new(tokenizer, rows_of, cap):
    collator = MaskingCollator(tokenizer, 0.5, seed=(1,))
    stream = rows_of(stream_of([10]), tokenizer, "text", 8, repeat=True, max_rows=cap)
    rows = [row for row, _ in zip(stream, range(60), strict=False)]
    first = rows[0]["input_ids"].tolist()
    again = [row for row in rows if row["input_ids"].tolist() == first]
    masks = {tuple(collator([row])["labels"][0].tolist()) for row in again}
    assert len(again) > 3 and len(masks) > 1
    assert len({row["sample_id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("ranks", (1, 2, 3, 4))
def test_a_stream_is_evaluated_once_over_ranks(tokenizer, ranks):
    """Every rank reads the whole validation stream and takes its own rows of it."""
    _, validation = split_stream(stream_of([50, 3, 20]), 30)
    lines = StreamedLines(validation, tokenizer, "text", 8)
    whole = [tuple(row["input_ids"]) for row in lines]
    parts = [list(EvaluationRows(lines, 2, rank, ranks)) for rank in range(ranks)]
    real = [tuple(row["input_ids"]) for part in parts for row in part if "padding_row" not in row]
    assert sorted(real) == sorted(whole) and len({len(part) for part in parts}) == 1


@pytest.mark.parametrize("rows", ([12, 0], [0, 12], [0, 0]))
def test_a_rank_without_rows(rows):
    empty = rows.index(0)
    with pytest.raises(UserError, match=f"rank {empty} of 2 gets no text of the stream, which comes in 2 file"):
        rank_share(stream_of(rows), "text", None, empty, 2)
    if any(rows):
        rank_share(stream_of(rows), "text", None, 1 - empty, 2)


def test_a_rank_of_blank_rows():
    def blank():
        yield from ({"text": " \n"} for _ in range(5))

    with pytest.raises(UserError, match="the stream holds no text in column 'text'"):
        rank_share(IterableDataset.from_generator(blank), "text", None, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", (0, 1))
def test_a_stream_resumes_exactly(workers, assets, masked_assets, tmp_path):
    """Over the end of the text and of the cap: 10 steps at once are 10 steps with a break, masks included.

    A process that reads the stream is forked after tokenizers has started its threads, which waited for ever there.
    """

    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def train(output):
        return run(
            "run_mlm.py", *masked_assets.scratch("bert"), "--train_file", assets.train, "--do_train", "--use_cpu",
            "--streaming", "--output_dir", output, "--per_device_train_batch_size", 4, "--max_steps", 10,
            "--logging_steps", 1, "--max_train_samples", 11, "--line_by_line", "--max_seq_length", 32,
            "--save_steps", 6, "--dataloader_num_workers", workers, seconds=50,
        )  # fmt: skip

    train(whole)
    train(broken)
    for path in broken.iterdir():
        if path.is_file():
            path.unlink()
        elif path.name != "checkpoint-6":
            shutil.rmtree(path)
    assert "checkpoint-6" in train(broken).stderr
    assert losses(broken) == losses(whole) and len(losses(whole)) == 10
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_ranks_train_on_a_stream(assets, tmp_path):
    """Two files over two ranks, validation rows split off both; a cap; more steps than the cap has rows."""
    lines = [line for line in assets.train.read_text().splitlines() if line.strip()]
    for part in (0, 1):
        (tmp_path / f"part{part}.txt").write_text("\n".join(lines[part * 130 : part * 130 + 130]))
    run_ranks(
        2, "run_clm.py", "--model_type", "gpt2", "--tokenizer_name", assets.tokenizer, "--config_overrides",
        "n_embd=32,n_layer=2,n_head=2,n_positions=64", "--train_file", tmp_path / "part*.txt", "--do_train",
        "--do_eval", "--streaming", "--max_steps", 5, "--max_train_samples", 9, "--output_dir", tmp_path / "out",
        "--per_device_train_batch_size", 2, "--block_size", 32, "--logging_steps", 1, "--use_cpu",
    )  # fmt: skip
    assert len(losses(tmp_path / "out")) == 5
    # Every twentieth row of each file, 14 of 260.
    kept = "".join(line + "\n" for part in (0, 1) for line in validation_rows(lines[part * 130 :][:130], part))
    tokens = len(AutoTokenizer.from_pretrained(assets.tokenizer)(kept)["input_ids"])
    assert abs(results(tmp_path / "out")["eval_samples"] - tokens // 32) <= 1


def validation_rows(lines: list[str], shard: int) -> list[str]:
    return [line for index, line in enumerate(lines) if (61 * shard + 5 * index) % 100 < 5]


@pytest.mark.parametrize("split", ("training", "validation"))
def test_a_stream_of_less_than_a_row_is_known_before_training(tokenizer, split):
    stream = IterableDataset.from_generator(lambda: iter([{"text": "too short"}]))
    with pytest.raises(UserError, match=f"the {split} stream holds no text, or less than one row of 512 tokens"):
        StreamedBlocks(stream, tokenizer, "text", 512, repeat=split == "training", max_rows=10)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "logging_steps"), [(0, 7), (1, 1)])
def test_a_line_that_cannot_be_read_loses_no_step(workers, logging_steps, assets, tmp_path):
    """The steps before it are in a checkpoint; once it is mended, the run goes on as if it had always been whole.

    Also between two lines of the log: the first loss afterwards was too small by the steps before.
    """
    lines = assets.train_jsonl.read_text().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:1200]))
    (tmp_path / "b.jsonl").write_text("".join(lines[1200:1400]) + "{broken\n")
    flags = [
        "--model_name_or_path", assets.gpt2, "--train_file", tmp_path / "*.jsonl", "--streaming", "--max_steps", 40,
        "--per_device_train_batch_size", 32, "--block_size", 32, "--do_train", "--use_cpu",
        "--logging_steps", logging_steps, "--save_strategy", "no", "--dataloader_num_workers", workers,
    ]  # fmt: skip
    said = run("run_clm.py", *flags, "--output_dir", tmp_path / "out", code=2).stderr.splitlines()[-1]
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    assert said == (
        f"error: {tmp_path}/b.jsonl, line 201: not valid JSON (Expecting property name enclosed in double quotes); "
        f"the steps before it are saved in {saved}"
    )
    (tmp_path / "b.jsonl").write_text("".join(lines[1200:1400]))
    run("run_clm.py", *flags, "--output_dir", tmp_path / "out")
    run("run_clm.py", *flags, "--output_dir", tmp_path / "whole")
    found, wanted = (
        [row.get("loss", row.get("train_loss")) for row in log_history(tmp_path / name)] for name in ("out", "whole")
    )
    assert found == wanted and len(found) == 40 // logging_steps + 1


def test_a_stream_of_datasets_is_shuffled_anew_each_time():
    rows = IterableDataset.from_generator(lambda: ({"input_ids": [n]} for n in range(50))).shuffle(
        seed=1, buffer_size=50
    )
    first, second = (list(islice(RepeatedRows(rows), 100)) for _ in range(2))
    order = [row["input_ids"][0] for row in first]
    assert first == second and [row["sample_id"] for row in first] == list(range(100))
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50)) and order[:50] != order[50:]
    assert list(RepeatedRows(rows.take(0))) == []


class Own(torch.utils.data.IterableDataset):
    """Rows with names of their own, another one in each pass; ``sized`` ones know how many."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for number in range(4):
            yield {"input_ids": torch.tensor([number, self.epoch]), "sample_id": f"row {number}"}


class Sized(Own):
    def __len__(self):
        return 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_torch_is_told_the_epoch(workers):
    options = {"num_workers": workers, "collate_fn": ignore_filler_samples(default_data_collator, True, seed=(1,))}
    batches = list(islice(stream_batches(Own(), 2, options), 5))
    assert [batch["input_ids"].tolist() for batch in batches] == [
        [[first, epoch], [first + 1, epoch]] for epoch in range(3) for first in (0, 2)
    ][:5]
    loader = stream_batches(Sized(), 2, options)
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert torch.cat([batch["input_ids"] for batch in loader]).tolist() == [[n, epoch] for n in range(4)]

"""Blocks against a plain-Python oracle: no token lost but the last partial block, whatever the rows look like."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from gaudi_lm.data.blocks import cut, group_into_blocks, to_list_array
from gaudi_lm.data.loading import split_rows
from gaudi_lm.data.sampling import TrainingBatches, TrainingRows, row_lengths
from gaudi_lm.errors import UserError
from gaudi_lm.training.evaluation import FILLER_SAMPLE, SAMPLE_ID, EvaluationRows, evaluation_loader

rows_of_tokens = st.lists(st.lists(st.integers(0, 999), max_size=30), max_size=40)


def tokenised(rows: list[list[int]], chunks: int) -> Dataset:
    """A dataset of token rows whose Arrow column is in several chunks."""
    lengths = [
        np.array([len(row) for row in part])
        for part in np.array_split(np.arange(len(rows)), chunks)
        for part in [[rows[i] for i in part]]
    ]
    flat = [
        np.array([t for i in part for t in rows[i]], dtype=np.int32)
        for part in np.array_split(np.arange(len(rows)), chunks)
    ]
    arrays = [to_list_array(tokens, length.astype(np.int64)) for tokens, length in zip(flat, lengths, strict=True)]
    return Dataset(pa.table({"input_ids": pa.chunked_array(arrays, type=pa.list_(pa.int32()))}))


@given(rows=rows_of_tokens, size=st.integers(1, 50), chunks=st.integers(1, 5), limit=st.none() | st.integers(1, 10))
def test_blocks_equal_the_oracle(rows, size, chunks, limit):
    flat = [token for row in rows for token in row]
    expected = [flat[start : start + size] for start in range(0, len(flat) - size + 1, size)][:limit]
    dataset = tokenised(rows, chunks)
    if not expected:
        with pytest.raises(UserError, match="less than one block"):
            group_into_blocks(dataset, size, max_blocks=limit)
        return
    blocks = group_into_blocks(dataset, size, max_blocks=limit)
    assert blocks["input_ids"][:] == expected
    assert blocks.features["input_ids"].feature.dtype == "int32"


@given(rows=rows_of_tokens, start=st.integers(0, 20), stop=st.integers(0, 40), size=st.integers(1, 20))
def test_blocks_of_a_slice(rows, start, stop, size):
    """A sliced dataset shares its buffers with the whole; only the rows of the slice count."""
    part = rows[start:stop]
    flat = [token for row in part for token in row]
    if len(flat) < size or not rows:
        return
    blocks = group_into_blocks(tokenised(rows, 3).select(range(start, min(stop, len(rows)))), size)
    assert sum(blocks["input_ids"][:], []) == flat[: len(flat) // size * size]


@given(lengths=st.lists(st.integers(0, 40), max_size=30), size=st.integers(1, 30))
def test_the_remainder_is_carried(lengths, size):
    ends = np.cumsum([0, *lengths])
    chunks = [np.arange(a, b, dtype=np.int32) for a, b in zip(ends, ends[1:], strict=False)]
    whole = [block for array in cut(iter(chunks), size) for block in array.tolist()]
    assert sum(whole, []) == list(range(ends[-1] // size * size))


@given(rows=st.integers(2, 300), percentage=st.integers(1, 99))
def test_the_split_is_exact(rows, percentage):
    data = Dataset.from_dict({"n": range(rows)})
    train, validation = split_rows(data, percentage)
    assert validation["n"][:] + train["n"][:] == list(range(rows))
    assert len(validation) == min(max(1, round(rows * percentage / 100)), rows - 1)


@given(rows=st.integers(1, 50), batch=st.integers(1, 7), world=st.integers(1, 4), epoch=st.integers(0, 3))
def test_ranks_share_the_batches_of_one(rows, batch, world, epoch):
    data = Dataset.from_dict({"input_ids": [[n] for n in range(rows)]})
    ranks = [TrainingBatches(data, batch, seed=1, rank=rank, world_size=world) for rank in range(world)]
    one = TrainingBatches(data, batch * world, seed=1)
    for sampler in [*ranks, one]:
        sampler.set_epoch(epoch)
    steps = [sum(step, []) for step in zip(*ranks, strict=True)]
    assert steps == list(one)
    numbers = [number for step in steps for number in step]
    assert sorted(number for number in numbers if number >= 0) == list(range(epoch * rows, (epoch + 1) * rows))
    # What completes the last step is marked by its sign, and repeats the epoch's first rows.
    completing = [~number for number in numbers if number < 0]
    assert numbers[rows:] == [~number for number in completing] and len(completing) < batch * world
    assert completing == np.resize(numbers[:rows], len(completing)).tolist()


def test_rows_carry_their_draw():
    data = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]]})
    rows = TrainingRows(data).__getitems__([4, 2])
    assert [(row["sample_id"], row["input_ids"].tolist()) for row in rows] == [(4, [3, 4]), (2, [5, 6])]
    assert [FILLER_SAMPLE in row for row in TrainingRows(data).__getitems__([0, ~0])] == [False, True]


def test_what_a_transform_draws_depends_on_the_batch_and_the_seed():
    data = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6]]})
    data.set_transform(lambda rows: {"input_ids": [torch.randint(2**30, (2,)).tolist() for _ in rows["input_ids"]]})

    def drawn(rows) -> list:
        return [row["input_ids"] for row in rows]

    torch.manual_seed(5)
    after = torch.rand(())
    torch.manual_seed(5)
    first = drawn(TrainingRows(data, seed=1).__getitems__([2, 0]))
    assert first == drawn(TrainingRows(data, seed=1).__getitems__([2, 0]))
    for seed, numbers in ((2, [2, 0]), (1, [5, 3])):
        assert first != drawn(TrainingRows(data, seed=seed).__getitems__(numbers))
    assert drawn(EvaluationRows(data, 2, 0, 1)) == drawn(EvaluationRows(data, 2, 0, 1))
    assert torch.rand(()) == after, "dropout does not depend on it"


@given(rows=st.integers(0, 30), batch=st.integers(1, 5), world=st.integers(1, 4), sized=st.booleans())
def test_evaluation_takes_each_row_once(rows, batch, world, sized):
    data = Dataset.from_dict({"input_ids": [[n] for n in range(rows)]})
    if not sized:
        data = Dataset.from_dict({"input_ids": [[n] for n in range(rows + 1)]}).to_iterable_dataset().take(rows)
    parts = [list(EvaluationRows(data, batch, rank, world)) for rank in range(world)]
    assert {len(part) for part in parts} == {-(-rows // (batch * world)) * batch}
    real = [row["input_ids"][0] for part in parts for row in part if FILLER_SAMPLE not in row]
    assert sorted(real) == list(range(rows))
    assert all(row[SAMPLE_ID] == row["input_ids"][0] for part in parts for row in part)


def test_a_stream_is_read_by_one_process_that_counts_its_rows():
    data = Dataset.from_dict({"input_ids": [[1]]})
    for rows, workers in ((data, 2), (data.to_iterable_dataset(), 0)):
        assert evaluation_loader(rows, list, 2, 0, 1, num_workers=2, prefetch_factor=2).num_workers == workers


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_processes_that_read_rows_for_evaluation_take_turns(workers, monkeypatch):
    rows = EvaluationRows(Dataset.from_dict({"input_ids": [[n] for n in range(17)]}), 2, 1, 2)
    whole, turns = list(rows), []
    for turn in range(workers):
        worker = SimpleNamespace(id=turn, num_workers=workers)
        monkeypatch.setattr("gaudi_lm.training.evaluation.get_worker_info", lambda worker=worker: worker)
        own = list(rows)
        turns.append([own[start : start + 2] for start in range(0, len(own), 2)])
    batches = [turns[number % workers][number // workers] for number in range(len(whole) // 2)]
    assert sum(batches, []) == whole and sum(map(len, turns)) == len(batches)


def test_no_step_of_training_rows():
    for rows, words in ((0, "^train_dataset has no rows$"), (3, "^--dataloader_drop_last leaves nothing: 3 rows are")):
        with pytest.raises(UserError, match=words):
            TrainingBatches(Dataset.from_dict({"input_ids": [[1]] * rows}), 4, seed=1, drop_last=True)


def test_lengths_of_rows_that_a_transform_makes():
    """Not those of what is stored, which may have no tokens at all; the run's own random numbers stay as they are."""
    texts = ["a " * number for number in (3, 9, 1, 5, 7)]

    def crop(rows: dict) -> dict:
        return {"input_ids": [[1] * (len(text.split()) - np.random.randint(0, 1)) for text in rows["text"]]}

    data, before = Dataset.from_dict({"text": texts}).with_transform(crop), np.random.get_state()[2]
    assert row_lengths(data).tolist() == [3, 9, 1, 5, 7] and np.random.get_state()[2] == before
    assert TrainingBatches(data, 2, seed=1, group_by_length=True).lengths == [3, 9, 1, 5, 7]

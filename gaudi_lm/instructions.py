"""Examples of instructions and answers to rows of tokens, with the exact span that is trained.

Prompt and answer are tokenised apart and joined as tokens: no merge crosses the border, and what is trained is what a
model continues when it is given the prompt alone.

A row keeps both what it says and what is trained in one int32: a token that is not a target stands as its complement,
``~token``, which is negative. So a row can be cut, concatenated and packed like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .packing import count_tokens, encode, group_into_blocks, map_rows, special_ends, to_list_array
from .predictions import IGNORE_INDEX
from .prompts import ExampleFormat, conversations, fill_prompts, split_conversation, text_of
from .rows import join_rows, pad_rows, shorten_rows
from .runtime import UserError

logger = logging.getLogger("gaudi_lm")


def encode_examples(
    table: pa.Table, form: ExampleFormat, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """Examples as rows of tokens, targets as they are and all others as their complement, without the final EOS.

    Returns:
        ``(tokens, lengths)``: int32 of shape ``[sum(lengths)]`` and int64 of shape ``[examples]``.
    """
    start = [~token for token in special_ends(tokenizer)[0]]
    if form.style == "text":
        return join_rows(start, encode(tokenizer, text_of(table, form.columns["text"]).to_pylist(), False))
    if form.style in ("instruction", "sql"):
        prompts, answers = fill_prompts(table, form), text_of(table, form.columns["output"]).to_pylist()
        tokens, lengths = encode(tokenizer, prompts + answers, add_special_tokens=False)
        border = int(lengths[: len(prompts)].sum())
        prompt, answer = (~tokens[:border], lengths[: len(prompts)]), (tokens[border:], lengths[len(prompts) :])
        return join_rows(start, prompt, answer)
    turns = [split_conversation(messages, tokenizer) for messages in conversations(table, form)]
    tokens, lengths = encode(tokenizer, [turn for row in turns for turn in row], add_special_tokens=False)
    given = np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)  # turns of every row come in pairs
    row = np.repeat(np.arange(len(turns)), [len(row) for row in turns])
    totals = np.bincount(row, weights=lengths, minlength=len(turns)).astype(np.int64)
    tokens = np.where(given, ~tokens, tokens)
    # The final EOS is added later, for all styles alike.
    ends = (np.cumsum(totals) - 1)[totals > 0]
    last = np.zeros(len(tokens), dtype=bool)
    last[ends] = tokens[ends] == tokenizer.eos_token_id
    totals[totals > 0] -= last[ends]
    return tokens[~last], totals


def finish_rows(
    tokens: np.ndarray, lengths: np.ndarray, eos: int, max_length: int | None, train_on_inputs: bool, has_prompt: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Shorten rows so that the EOS fits, add it, and empty the rows whose answer is gone.

    Args:
        tokens, lengths: from :func:`encode_examples`.
        max_length: tokens of a row, EOS included; None leaves rows as they are.
        train_on_inputs: all tokens become targets.
        has_prompt: whether a row without targets has lost its answer.

    Returns:
        ``(tokens, lengths)``; a row of length 0 has no answer left.
    """
    whole = lengths
    if max_length is not None:
        tokens, lengths = shorten_rows(tokens, lengths, max_length - 1)
    row = np.repeat(np.arange(len(lengths)), lengths)
    targets = np.bincount(row[tokens >= 0], minlength=len(lengths))
    # An empty answer is an answer: EOS alone. One that was cut off entirely is not.
    gone = (targets == 0) & ((lengths < whole) | (lengths == 0)) if has_prompt else lengths == 0
    if train_on_inputs:
        tokens = np.where(tokens < 0, ~tokens, tokens)
    kept = tokens[~gone[row]], np.where(gone, 0, lengths)
    return join_rows(kept, (np.full((~gone).sum(), eos, np.int32), (~gone).astype(np.int64)))


def tokenise_examples(
    dataset: Dataset,
    form: ExampleFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    train_on_inputs: bool,
    concatenate: bool,
    limit: int | None,
    split: str,
    **options,
) -> Dataset:
    """Rows of ``input_ids`` (targets plain, others as complements): one an example, or blocks of all examples.

    Args:
        max_length: longest row, or with ``concatenate`` the size of the blocks; an example may then span two blocks.
        limit: use at most so many examples, or blocks; no more is tokenised than they need.
        options: passed to :func:`gaudi_lm.packing.map_rows`.

    Raises:
        UserError: no example has any of its answer left.
    """
    longest = None if concatenate else max_length

    def encode_rows(table: pa.Table) -> pa.Table:
        tokens, lengths = encode_examples(table, form, tokenizer)
        rows = finish_rows(tokens, lengths, tokenizer.eos_token_id, longest, train_on_inputs, form.style != "text")
        return pa.table({"input_ids": to_list_array(*rows), "length": pa.array(lengths + 1, pa.int32())})

    if concatenate:
        wanted = None if limit is None else limit * max_length
        rows = map_rows(dataset, encode_rows, wanted=wanted, measure=count_tokens, **options)
    else:
        examples = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
        rows = map_rows(examples, encode_rows, **options)
    table = rows.with_format("arrow")[:]
    kept = pc.list_value_length(table["input_ids"]).to_numpy() > 0
    cut = kept & (table["length"].to_numpy() > max_length) if not concatenate else np.zeros(0, bool)
    if not kept.any():
        raise UserError(
            f"none of the {len(kept)} {split} examples has an answer within --max_seq_length {max_length}: raise it"
        )
    logger.info(
        "%s: %d examples; %d shortened to --max_seq_length %d (their EOS is kept), %d left out since no token of an "
        "answer is within it",
        split, int(kept.sum()), int(cut.sum()), max_length, int((~kept).sum()),
    )  # fmt: skip
    rows = rows.remove_columns("length")
    if concatenate:
        return group_into_blocks(rows, max_length, max_blocks=limit, split=split)
    return rows if kept.all() else rows.select(np.flatnonzero(kept))


def split_targets(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(input_ids, labels)`` of tokens some of which are complements; their labels are -100."""
    return np.where(rows < 0, ~rows, rows), np.where(rows < 0, IGNORE_INDEX, rows)


def collate_examples(rows: list[dict], padding: int, lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    """A batch of rows: ``input_ids``, ``attention_mask`` and ``labels``, int64 of shape ``[rows, length]``.

    Padding is told by its place, so a padding token that is also the EOS keeps the EOS a target. The model shifts the
    labels by one, so the first one is never a target: -100 keeps it out of the token counts.

    Args:
        lengths: see :func:`gaudi_lm.rows.pad_rows`.
    """
    tokens, used = pad_rows([row["input_ids"] for row in rows], lengths, ~padding)
    input_ids, labels = split_targets(tokens)
    labels[:, 0] = IGNORE_INDEX
    batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
    if lengths or (used < tokens.shape[1]).any():
        batch["attention_mask"] = torch.from_numpy((np.arange(tokens.shape[1]) < used[:, None]).astype(np.int64))
    return batch


def collate_packed(rows: list[dict], assemble: Callable[[list[dict]], dict]) -> dict[str, torch.Tensor]:
    """A batch of rows that :func:`gaudi_lm.sequences.pack_sequences` packed from examples.

    Args:
        assemble: a :class:`gaudi_lm.sequences.PackedCollator` for the model.
    """
    batch = assemble(rows)
    batch["labels"][batch["labels"] < 0] = IGNORE_INDEX
    batch["input_ids"] = torch.where(batch["input_ids"] < 0, ~batch["input_ids"], batch["input_ids"])
    return batch


def show_targets(row: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row as text, its trained parts between ``>>>`` and ``<<<``."""
    input_ids, labels = split_targets(row)
    borders = np.flatnonzero(np.diff(labels != IGNORE_INDEX)) + 1
    parts = []
    for tokens, target in zip(np.split(input_ids, borders), np.split(labels, borders), strict=True):
        text = tokenizer.decode(tokens)
        parts.append(f">>>{text}<<<" if target[0] != IGNORE_INDEX else text)
    return "".join(parts)

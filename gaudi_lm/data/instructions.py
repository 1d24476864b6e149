"""Examples of instructions and answers to rows of tokens, with the exact span that is trained.

The results are standard rows: ``input_ids``, and ``labels`` of the same length, -100 where a token is not learnt.
While rows are made, both are one int32: a token that is not a target stands as its complement, ``~token``, which is
negative.
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

from gaudi_lm.data.blocks import count_tokens, group_into_blocks, map_rows, to_list_array
from gaudi_lm.data.chat_templates import ChatTemplate
from gaudi_lm.data.completions import encode_examples
from gaudi_lm.data.masked_token_budget import IGNORE_INDEX
from gaudi_lm.data.prompts import ExampleFormat
from gaudi_lm.data.ragged import join_rows, pad_rows, unpadded
from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

NAMED_PROBLEMS = 5  # examples that cannot be read and are named in the log


def finish_rows(
    tokens: np.ndarray,
    lengths: np.ndarray,
    ends: np.ndarray | int,
    max_length: int | None,
    train_on_inputs: bool,
    closed: np.ndarray | bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Shorten rows so that what ends an answer fits, add it where it is missing, and empty rows whose answer is gone.

    A row that is cut within an answer gets the end in its last place; one that is cut elsewhere is cut behind its last
    answer.

    Args:
        tokens, lengths, ends, closed: see :class:`gaudi_lm.data.completions.EncodedRows`.
        max_length: tokens of a row, with its end; None leaves rows as they are.
        train_on_inputs: all tokens become targets.

    Returns:
        ``(tokens, lengths)``; a row of length 0 has no answer left.
    """
    closed = np.broadcast_to(closed, lengths.shape)
    kept, add_end = lengths, ~closed
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if max_length is not None:
        cut = lengths + ~closed > max_length
        within = position < max_length - 1
        answered = np.zeros(len(lengths), np.int64)  # tokens through the last target that is kept
        answered[row[within & (tokens >= 0)]] = position[within & (tokens >= 0)] + 1
        broken = np.zeros(len(lengths), bool)  # whether the first token that is not kept is a target
        broken[row[(position == max_length - 1) & (tokens >= 0)]] = True
        broken &= answered == max_length - 1
        kept = np.where(cut, np.where(broken, max_length - 1, answered), lengths)
        add_end = np.where(cut, broken, ~closed)
    inside = position < kept[row]
    tokens, row = tokens[inside], row[inside]
    targets = np.bincount(row[tokens >= 0], minlength=len(lengths))
    # An empty answer is an answer: its end alone. One that was cut off entirely is not.
    gone = (targets == 0) & ((kept < lengths) | (lengths == 0))
    if train_on_inputs:
        tokens = np.where(tokens < 0, ~tokens, tokens)
    add_end = add_end & ~gone
    ends = np.broadcast_to(ends, lengths.shape)[add_end].astype(np.int32)
    return join_rows((tokens[~gone[row]], np.where(gone, 0, kept)), (ends, add_end.astype(np.int64)))


def tokenise_examples(
    dataset: Dataset,
    example_format: ExampleFormat,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    train_on_inputs: bool,
    concatenate: bool,
    limit: int | None,
    split: str,
    format_example: Callable[[dict[str, str]], tuple[str, str]] | None = None,
    stop_ids: int | list[int] | None = None,
    **options,
) -> Dataset:
    """Rows of ``input_ids`` and ``labels``, lists of int32: one an example, or blocks of all examples.

    Args:
        max_length: longest row, or with ``concatenate`` the size of the blocks; an example may then span two blocks.
        limit: use at most so many examples, or blocks; no more is tokenised than they need.
        format_example: from ``instruction``, ``input`` and ``output``, prompt and response; where no chat template
            writes them.
        stop_ids: see :class:`gaudi_lm.data.chat_templates.ChatTemplate`.
        options: passed to :func:`gaudi_lm.data.blocks.map_rows`.

    Raises:
        UserError: no example can be read and has any of its answer left.
    """
    longest = None if concatenate else max_length

    template = ChatTemplate(tokenizer, stop_ids) if example_format.style in ("chat", "messages") else None

    def encode_rows(table: pa.Table) -> pa.Table:
        encoded = encode_examples(table, example_format, tokenizer, template, format_example)
        tokens, lengths = finish_rows(
            encoded.tokens, encoded.lengths, encoded.ends, longest, train_on_inputs, encoded.closed
        )
        whole = pa.array(encoded.lengths + ~encoded.closed, pa.int32())
        problems = pa.array(encoded.problems, pa.string())
        input_ids, labels = (to_list_array(values, lengths) for values in split_targets(tokens))
        return pa.table({"input_ids": input_ids, "labels": labels, "length": whole, "problem": problems})

    if concatenate:
        wanted = None if limit is None else limit * max_length
        rows = map_rows(dataset, encode_rows, wanted=wanted, measure=count_tokens, **options)
    else:
        examples = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
        rows = map_rows(examples, encode_rows, **options)
    table = rows.with_format("arrow")[:]
    kept = pc.list_value_length(table["input_ids"]).to_numpy() > 0
    cut = kept & (table["length"].to_numpy() > max_length) if not concatenate else np.zeros(0, bool)
    unread = pc.is_valid(table["problem"]).to_numpy()
    named = [f"row {row + 1}: {table['problem'][row]}" for row in np.flatnonzero(unread)[:NAMED_PROBLEMS].tolist()]
    if unread.sum() > len(named):
        named.append("...")
    if unread.all():
        raise UserError(f"none of the {len(kept)} {split} examples can be read: {'; '.join(named)}")
    if not kept.any():
        raise UserError(
            f"none of the {len(kept)} {split} examples has an answer within --max_seq_length {max_length}: raise it"
            + (f" (not read: {'; '.join(named)})" if named else "")
        )
    if named:
        logger.warning("%s: %d of %d examples left out: %s", split, unread.sum(), len(kept), "; ".join(named))
    logger.info(
        "%s: %d examples; %d truncated to --max_seq_length %d (their EOS is kept), %d left out since no token of an "
        "answer is within it",
        split, int(kept.sum()), int(cut.sum()), max_length, int((~kept & ~unread).sum()),
    )  # fmt: skip
    rows = rows.remove_columns(["length", "problem"])
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
        rows: with ``input_ids``, perhaps ``labels``, by default the same, and what :func:`~.ragged.unpadded` reads.
        lengths: see :func:`gaudi_lm.data.ragged.pad_rows`.
    """
    input_ids, used = pad_rows([*map(unpadded, rows)], lengths, padding)
    targets = [unpadded(row, "labels" if "labels" in row else "input_ids") for row in rows]
    labels, _ = pad_rows(targets, [input_ids.shape[1]], IGNORE_INDEX)
    labels[:, 0] = IGNORE_INDEX
    batch = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
    if lengths or (used < input_ids.shape[1]).any():
        batch["attention_mask"] = torch.from_numpy((np.arange(input_ids.shape[1]) < used[:, None]).astype(np.int64))
    return batch


def show_targets(row: dict, tokenizer: PreTrainedTokenizerBase) -> str:
    """A row as text, its trained parts, by their labels, between ``>>>`` and ``<<<``."""
    labels = np.asarray(row["labels"])
    input_ids = np.where(labels == IGNORE_INDEX, row["input_ids"], labels)
    borders = np.flatnonzero(np.diff(labels != IGNORE_INDEX)) + 1
    parts = []
    for tokens, target in zip(np.split(input_ids, borders), np.split(labels, borders), strict=True):
        text = tokenizer.decode(tokens)
        parts.append(f">>>{text}<<<" if target[0] != IGNORE_INDEX else text)
    return "".join(parts)

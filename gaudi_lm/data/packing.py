"""Several texts in a row of fixed length, none of which sees another.

Texts of a dataset read line by line, or of instructions, fill a fifth of a row of 512 tokens; the rest is padding
that is computed and thrown away. Here whole texts share a row (Krell et al. 2021, "Efficient sequence packing without
cross-contamination"): attention is block-diagonal, positions start anew with each text, and no text predicts the
first token of the next. So each text's loss is what it is when it stands alone.

A script uses it in two steps::

    train = pack_sequences(tokenised, length=512)         # input_ids, sequence_lengths, and labels if there were any
    collator = PackedCollator.for_model(model, pad_token_id=tokenizer.pad_token_id, length=512)
    batch = collator(rows)                                # fixed shapes

A masked model's script then masks `batch["input_ids"]` itself, as in any other batch: padding is `pad_token_id`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from datasets.utils import tqdm
from torch import Tensor, nn

from gaudi_lm.architectures import architecture_of, is_patched, packable
from gaudi_lm.data.masked_token_budget import IGNORE_INDEX
from gaudi_lm.errors import UserError

logger = logging.getLogger("gaudi_lm")

ROWS_PER_CHUNK = 100_000  # of a packed table: keeps the 32-bit offsets of an Arrow list far from their limit


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: each text, longest first, goes into the fullest row that still holds it.

    Args:
        lengths: int, of shape [texts], each in 1..capacity.

    Returns:
        int64 of shape [texts]: the number of each text's row. Rows are numbered by their first text, so that a data
        set that is not shuffled is still read in about its own order.
    """
    rows_with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # a set of numbers as bits: the smallest space of at least n is one shift and one lowest bit
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows = 0
    order = np.argsort(-lengths, kind="stable")
    texts = zip(order.tolist(), lengths[order].tolist(), strict=True)
    for text, length in tqdm(texts, total=len(order), desc="Packing", unit=" texts"):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            candidates = rows_with_space[space]
            row = candidates.pop()
            if not candidates:
                spaces ^= 1 << space
        else:
            space, row = capacity, rows
            rows += 1
        row_of[text] = row
        rows_with_space[space - length].append(row)
        spaces |= 1 << (space - length)
    _, first = np.unique(row_of, return_index=True)
    rank = np.empty(rows, dtype=np.int64)
    rank[np.argsort(first)] = np.arange(rows)
    return rank[row_of]


def pack_sequences(
    dataset: Dataset, length: int, *, split: str = "train", rows_per_step: int | None = None
) -> Dataset:
    """Pack the texts of a tokenised dataset into rows of at most `length` tokens.

    Args:
        dataset: `input_ids`, lists of int, and perhaps `labels`, lists of the same lengths (-100: no target). Other
            columns are dropped, and so are empty texts.
        length: tokens in a row.
        split: name for the log line and the error.
        rows_per_step: rows of an optimizer step, of all ranks; for "train" the log says how many texts that are.

    Returns:
        `input_ids` (list<int32>, the texts of a row one after the other, without padding), `sequence_lengths`
        (list<int32>), and `labels` (list<int32>) if there were any. It is a copy in memory: 4 bytes a token, 8 with
        labels.

    Raises:
        UserError: a text is longer than `length`.
    """
    table = dataset.with_format("arrow")[:]
    names = [name for name in ("input_ids", "labels") if name in table.column_names]
    lengths = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
    if len(lengths) and lengths.max() > length:
        raise UserError(
            f"the {split} data has a text of {lengths.max()} tokens, and rows are of {length}: raise --max_seq_length "
            "or leave out --pack_sequences"
        )
    kept = np.flatnonzero(lengths)
    row_of = best_fit(lengths[kept], length)
    order = kept[np.argsort(row_of, kind="stable")]
    texts_in_row = np.bincount(row_of, minlength=1)
    columns: dict[str, list[pa.Array]] = {name: [] for name in [*names, "sequence_lengths"]}
    views = {name: _views(table[name]) for name in names}
    for first in range(0, len(texts_in_row), ROWS_PER_CHUNK):
        counts = texts_in_row[first : first + ROWS_PER_CHUNK]
        start = int(texts_in_row[:first].sum())
        texts = order[start : start + int(counts.sum())]
        ends = np.concatenate([[0], np.cumsum(counts)])
        tokens_before = np.concatenate([[0], np.cumsum(lengths[texts])])
        for name in names:
            columns[name].append(_lists(tokens_before[ends], _gather(views[name], texts, tokens_before)))
        columns["sequence_lengths"].append(_lists(ends, lengths[texts]))
    # A fingerprint spares datasets from hashing all tokens to make one.
    packed = Dataset(
        pa.table({name: pa.chunked_array(arrays) for name, arrays in columns.items()}),
        fingerprint=Hasher.hash(["packed", dataset._fingerprint, length]),
    )
    tokens, rows = int(lengths.sum()), len(texts_in_row)
    logger.info(
        "%s: %d texts with %d tokens packed into %d rows of %d: %.1f %% of the positions used, %.2f texts a row",
        *(split, len(kept), tokens, rows, length, 100 * tokens / (rows * length), len(kept) / rows),
    )
    if rows_per_step and split == "train":
        logger.info(
            "effective batch: %d packed rows an optimizer step, about %.0f texts; for as many texts as without "
            "packing, divide batch or gradient accumulation by %.1f",
            *(rows_per_step, rows_per_step * len(kept) / rows, len(kept) / rows),
        )
    return packed


def _views(column: pa.ChunkedArray) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """(first text of each chunk, tokens of each chunk, where each text starts in its chunk), tokens without a copy."""
    tokens, starts, sizes = [], [], []
    for chunk in column.chunks:
        lengths = pc.list_value_length(chunk).to_numpy(zero_copy_only=False)
        tokens.append(chunk.flatten().to_numpy(zero_copy_only=False))
        starts.append(np.cumsum(lengths) - lengths)
        sizes.append(len(chunk))
    firsts = np.cumsum([0, *sizes])[:-1]
    return firsts, tokens, np.concatenate(starts) if starts else np.empty(0, dtype=np.int64)


def _gather(views, texts: np.ndarray, tokens_before: np.ndarray) -> np.ndarray:
    firsts, tokens, starts = views
    gathered = np.empty(int(tokens_before[-1]), dtype=np.int32)
    chunks = (np.searchsorted(firsts, texts, side="right") - 1).tolist()
    offsets = tokens_before.tolist()
    for text, chunk, start in zip(range(len(texts)), chunks, starts[texts].tolist(), strict=True):
        begin, end = offsets[text], offsets[text + 1]
        gathered[begin:end] = tokens[chunk][start : start + end - begin]
    return gathered


def _lists(ends: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(ends, type=pa.int32()), pa.array(values, type=pa.int32()))


def check_packable(model: nn.Module) -> None:
    """Raise a UserError that names the architecture, unless the isolation of packed texts is proven for it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = base.config.model_type
    patched = is_patched(base)
    proven = packable(patched)
    if name not in proven:
        where = "optimum-habana's " if patched else ""
        raise UserError(
            f"--pack_sequences: {where}{name} is not known to keep packed texts apart; leave the flag out, or use one "
            f"of {', '.join(proven)}"
        )
    if base.config.is_decoder and not architecture_of(base.config).causal_head:
        raise UserError(f"--pack_sequences: {name} keeps packed texts apart as an encoder only; leave the flag out")
    if name == "falcon" and base.config.alibi:
        raise UserError("--pack_sequences: a falcon with alibi does not keep packed texts apart; leave the flag out")
    if getattr(base.config, "output_router_logits", False):
        raise UserError(
            f"--pack_sequences: the loss that balances the routers of {name} does not know packed texts; set "
            "output_router_logits to false in its configuration"
        )
    if getattr(getattr(base, "generation_config", None), "flash_attention_causal_mask", False):
        raise UserError(
            "--flash_attention_causal_mask lets packed texts see each other: leave out one of the two flags"
        )


@dataclass
class PackedCollator:
    """Rows of `pack_sequences` to tensors of fixed shapes, for one kind of model.

    Call it with rows (dicts of arrays `input_ids`, `sequence_lengths`, and `labels` for causal models); it returns
    `input_ids` and `position_ids` (batch, length) int64; `attention_mask`, block-diagonal, of shape (batch, length,
    length) for masked models and (batch, 1, length, length) for causal ones; and for causal models `labels` (batch,
    length) int64, a copy of the input ids where the rows have none, with -100 at each text's first token and at
    padding.

    In the mask a padding position is seen by none, not even by itself, and sees only the first token of the row: a
    softmax over nothing would be NaN.

    Attributes:
        length: positions in a row.
        pad_token_id: what stands after the texts.
        causal: whether texts are read from left to right.
        first_position: position of a text's first token.
        pad_position: position of padding.
        additive: the mask is 0 and a large negative number, of type `dtype`; otherwise it is 1 and 0, as uint8.
        dtype: float type of an additive mask; that of the model's weights.
    """

    length: int
    pad_token_id: int
    causal: bool
    first_position: int = 0
    pad_position: int = 0
    additive: bool = False
    dtype: torch.dtype = torch.float32

    @classmethod
    def for_model(cls, model: nn.Module, pad_token_id: int, length: int) -> PackedCollator:
        """The collator for a model, as transformers wrote it or as optimum-habana patched it.

        Raises:
            UserError: the isolation of texts is not proven for the architecture.
        """
        check_packable(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        name = base.config.model_type
        row = architecture_of(base.config)
        window = getattr(base.config, "sliding_window", None)
        if window and length > window:
            # A mask given from outside replaces the model's own, which would have held the window.
            raise UserError(
                f"--pack_sequences: {name} attends to {window} tokens, rows are of {length}: lower --max_seq_length"
            )
        scaling = getattr(base.config, "rope_scaling", None) or {}
        if "longrope" in (scaling.get("rope_type"), scaling.get("type")):
            # The longest text of a row would choose the frequencies of all.
            short = getattr(base.config, "original_max_position_embeddings", base.config.max_position_embeddings)
            if length > short:
                raise UserError(
                    f"--pack_sequences: with longrope, a text of more than {short} tokens changes the rotary "
                    f"frequencies of all texts in its row, and rows are of {length}: lower --max_seq_length"
                )
        first = row.position_of_first_token(base.config)
        return cls(
            length=length,
            pad_token_id=pad_token_id,
            causal=row.causal_head,
            first_position=first,
            pad_position=max(0, first - 1),
            additive=row.causal_head and not is_patched(base),
            dtype=base.dtype,
        )

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        shape = (len(rows), self.length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        positions = np.full(shape, self.pad_position, dtype=np.int64)
        texts = np.zeros(shape, dtype=np.int32)  # which text of its row a token belongs to, from 1; 0 is padding
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for index, row in enumerate(rows):
            lengths = np.asarray(row["sequence_lengths"])
            used = int(lengths.sum())
            starts = np.cumsum(lengths) - lengths
            input_ids[index, :used] = row["input_ids"]
            positions[index, :used] = np.arange(used) - np.repeat(starts, lengths) + self.first_position
            texts[index, :used] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            labels[index, :used] = row.get("labels", row["input_ids"])
            labels[index, starts] = IGNORE_INDEX
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(positions),
            "attention_mask": self._mask(torch.from_numpy(texts)),
        }
        if self.causal:
            batch["labels"] = torch.from_numpy(labels)
        return batch

    def _mask(self, texts: Tensor) -> Tensor:
        sees = (texts.unsqueeze(2) == texts.unsqueeze(1)) & (texts > 0).unsqueeze(2)
        if self.causal:
            sees = sees.tril()
        sees[:, :, 0] |= texts == 0
        if self.causal:
            sees = sees.unsqueeze(1)
        if not self.additive:
            return sees.to(torch.uint8)
        # The smallest bfloat16 is finite in every type that autocast may turn the mask into.
        return torch.zeros(sees.shape, dtype=self.dtype).masked_fill_(~sees, torch.finfo(torch.bfloat16).min)

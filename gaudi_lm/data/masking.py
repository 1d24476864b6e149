"""Batches of a masked language model: lengths that stay few, and masks that a row number alone decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gaudi_lm.data.masked_token_budget import IGNORE_INDEX, limit_predictions
from gaudi_lm.data.ragged import join_rows, pad_rows, shorten_rows, unpadded
from gaudi_lm.data.tokenization import encode, special_ends, vocabulary_size
from gaudi_lm.errors import UserError


def sequence_ends(
    tokenizer: PreTrainedTokenizerBase, max_length: int, need_padding: bool = False
) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a single text, such as ``[CLS]`` and ``[SEP]``.

    Raises:
        UserError: the tokenizer is not one of a masked language model, or a sequence has no room for text.
    """
    if tokenizer.mask_token_id is None:
        raise UserError("the tokenizer has no mask token: run_mlm.py needs one of a masked language model")
    if need_padding and tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no padding token, which --line_by_line needs")
    start, end = special_ends(tokenizer)
    if max_length <= len(start) + len(end):
        raise UserError(f"--max_seq_length {max_length}: the start and end of a sequence leave no room for text")
    return start, end


def encode_lines(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each text a row with the tokenizer's start and end, at most ``max_length`` tokens; texts that are blank, also to
    the tokenizer, are left out.

    Returns:
        ``(tokens, lengths)``, int32 of shape ``[sum(lengths)]`` and int64 of shape ``[rows]``.
    """
    texts = [text.rstrip("\r\n") for text in texts if text.strip()]
    start, end = special_ends(tokenizer)
    tokens, lengths = encode(tokenizer, texts, add_special_tokens=False)
    lengths = lengths[lengths > 0]  # of characters that a normalizer drops, there is nothing to learn
    return join_rows(start, shorten_rows(tokens, lengths, max_length - len(start) - len(end)), end)


@dataclass
class MaskingCollator:
    """Rows to a batch with fresh masks.

    Each token that is not special is chosen with ``probability``; of the chosen, a share becomes the mask token,
    another a random ordinary token, and the rest stays (Devlin et al. 2019: 80%, 10%, 10%). What is drawn for a row
    depends on ``seed``, the row's ``sample_id`` and nothing else: not on the batch it is in, its padding, the process,
    or what was drawn before.

    Attributes:
        tokenizer: one with a mask token.
        mask_share, random_share: of the chosen tokens.
        seed: whole numbers that are the same for a whole run.
        start, end: tokens put around each row, where the rows do not have them yet.
        lengths: rising lengths of which the smallest that fits is padded to; none to pad to the longest row.
        masked_token_budget: from (rows, length) of a batch, how many masked tokens the model's head takes; masks
            beyond are undone. None if it takes them all.
        assemble: makes ``input_ids`` and what goes with them from rows, where it is not plain padding.
    """

    needs_sample_id = True  # see gaudi_lm.data.sampling.ignore_filler_samples

    tokenizer: PreTrainedTokenizerBase
    probability: float
    seed: tuple[int, ...]
    mask_share: float = 0.8
    random_share: float = 0.1
    start: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    masked_token_budget: Callable[[int, int], int] | None = None
    assemble: Callable[[list[dict]], dict[str, torch.Tensor]] | None = None

    def __post_init__(self):
        if self.mask_share + self.random_share > 1:
            raise ValueError("mask_share and random_share are parts of the same tokens: together at most 1")
        self._special = np.zeros(vocabulary_size(self.tokenizer), dtype=bool)
        self._special[self.tokenizer.all_special_ids] = True
        known = np.zeros_like(self._special)
        known[list(self.tokenizer.get_vocab().values())] = True
        self._ordinary = np.flatnonzero(known & ~self._special)
        # Shared, so that worker processes can count too.
        self._undone = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def undone(self) -> int:
        """How many masks have been undone so far."""
        return int(self._undone)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """A batch: ``input_ids``, ``labels`` (-100 where nothing is masked) and, if there is padding,
        ``attention_mask``, each int64 of shape ``[rows, length]``."""
        batch = (self.assemble or self._pad)(rows)
        original = batch["input_ids"]
        sample_ids = [row["sample_id"] for row in rows]
        masked, labels = self._mask(original.numpy(), sample_ids)
        batch["input_ids"], batch["labels"] = torch.from_numpy(masked), torch.from_numpy(labels)
        if self.masked_token_budget is not None:
            # What completes a batch may repeat a row: the same masks, which would take the places of its own.
            _, own = np.unique(sample_ids, return_index=True)
            batch["labels"][np.setdiff1d(np.arange(len(rows)), own)] = IGNORE_INDEX
            limit = self.masked_token_budget(len(own), original.shape[1])
            generator = torch.Generator().manual_seed(int(sample_ids[0]))
            batch["input_ids"], batch["labels"], undone = limit_predictions(
                batch["input_ids"], batch["labels"], original, limit, generator
            )
            self._undone += undone
        return batch

    def _pad(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pad = self.tokenizer.pad_token_id or 0
        tokens, used = pad_rows([*map(unpadded, rows)], self.lengths, pad, self.start, self.end)
        batch = {"input_ids": torch.from_numpy(tokens)}
        if self.lengths or (used < tokens.shape[1]).any():
            batch["attention_mask"] = torch.from_numpy((np.arange(tokens.shape[1]) < used[:, None]).astype(np.int64))
        return batch

    def _mask(self, input_ids: np.ndarray, sample_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        rows, length = input_ids.shape
        # The numbers of a token stand together, so that more padding behind a row does not change them.
        noise = np.stack(
            [np.random.default_rng([*self.seed, int(sample)]).random((length, 3)) for sample in sample_ids]
        )
        chosen = (noise[..., 0] < self.probability) & ~self._special[input_ids]
        labels = np.where(chosen, input_ids, IGNORE_INDEX)
        random_tokens = self._ordinary[(noise[..., 2] * len(self._ordinary)).astype(np.int64)]
        masked = np.where(chosen & (noise[..., 1] < self.mask_share), self.tokenizer.mask_token_id, input_ids)
        return np.where(chosen & (noise[..., 1] >= 1 - self.random_share), random_tokens, masked), labels

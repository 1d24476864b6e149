"""Masked language modelling: the head on masked positions only, and packed lines against padded ones."""

import numpy as np
import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor

from gaudi_lm.data.masked_token_budget import IGNORE_INDEX, default_budget, limit_predictions
from gaudi_lm.data.packing import PackedCollator, pack_sequences
from gaudi_lm.modeling.loss import install_token_loss

from .measure import MIB, Pace, median, paired_ratio, race, sgemm, write_report
from .workloads import flop_per_token, paragraphs, roberta_base

LENGTH = 512
PROBABILITY = 0.15
PAD, MASK, FIRST_WORD = 1, 50264, 5


def lines() -> Dataset:
    """Lines of about 100 tokens, special tokens included: three paragraphs of the Python manual to a line."""
    texts = paragraphs()
    texts = [" ".join(texts[index : index + 3]) for index in range(0, len(texts), 3)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=8000, min_frequency=2)
    rows = [[0, *(token + FIRST_WORD for token in row.ids[: LENGTH - 2]), 2] for row in tokenizer.encode_batch(texts)]
    return Dataset.from_dict({"input_ids": rows})


def mask_tokens(input_ids: Tensor, limit: int | None) -> tuple[Tensor, Tensor]:
    """RoBERTa's dynamic masking; special tokens and padding are left alone."""
    chosen = (torch.rand(input_ids.shape) < PROBABILITY) & (input_ids >= FIRST_WORD)
    labels = torch.where(chosen, input_ids, IGNORE_INDEX)
    draw = torch.rand(input_ids.shape)
    masked = torch.where(chosen & (draw < 0.8), MASK, input_ids)
    masked = torch.where(chosen & (draw > 0.9), torch.randint_like(input_ids, FIRST_WORD, MASK), masked)
    if limit is not None:
        masked, labels, _ = limit_predictions(masked, labels, input_ids, limit)
    return masked, labels


def train(pace: Pace, batches: list[dict], masked_head: bool) -> None:
    """A contender: training steps on these batches in turn, dynamic masking included."""
    model = roberta_base()
    shape = tuple(batches[0]["input_ids"].shape)
    limit = default_budget(*shape, PROBABILITY) if masked_head else None
    if masked_head:
        install_token_loss(model, "masked", max_predictions_per_seq=lambda batch, length: limit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    step = 0
    while True:
        batch = dict(batches[step % len(batches)])
        pace.lap(tokens=int((batch["input_ids"] != PAD).sum()))
        batch["input_ids"], batch["labels"] = mask_tokens(batch["input_ids"], limit)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1


def _report(name, turns, ours, theirs, target, extra):
    model = roberta_base()
    speed = {who: [{"speed": t["tokens"] / t["seconds"]} for t in turns[who]] for who in (ours, theirs)}
    ratio = paired_ratio(speed[ours], speed[theirs], "speed")
    limit = median([{"rate": t["flop"] / t["seconds"]} for t in turns["sgemm"]], "rate")
    per_cpu = {who: [{"speed": t["tokens"] / t["cpu_seconds"]} for t in turns[who]] for who in (ours, theirs)}
    figures = {
        "ratio_by_cpu_time": paired_ratio(per_cpu[ours], per_cpu[theirs], "speed"),
        "sgemm_gflop_per_second": limit / 1e9,
        **extra,
    }
    for who, share in ((ours, extra["head_rows_share"]), (theirs, 1.0)):
        per_token = flop_per_token(model, LENGTH, head_share=share)
        tokens = median(speed[who], "speed")
        figures[f"{who}_tokens_per_second"] = tokens
        figures[f"{who}_flop_per_token"] = per_token
        figures[f"{who}_share_of_sgemm"] = tokens * per_token / limit
        figures[f"{who}_added_memory_mib"] = median(turns[who], "added_memory") / MIB
    write_report(name, ratio, f">= {target}", ratio >= target, figures)


def mlm_head(rounds: int = 7, batch: int = 4) -> None:
    """Masked head against full head on concatenated blocks."""
    tokens = np.concatenate(lines().with_format("numpy")[:]["input_ids"])
    blocks = torch.from_numpy(tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)).long()
    batches = [{"input_ids": blocks[index : index + batch]} for index in range(0, len(blocks) - batch, batch)]
    turns = race(
        {
            "masked_head": (train, {"batches": batches, "masked_head": True}),
            "full_head": (train, {"batches": batches, "masked_head": False}),
            "sgemm": (sgemm, {}),
        },
        rounds,
    )
    share = default_budget(batch, LENGTH, PROBABILITY) / (batch * LENGTH)
    _report("mlm_head", turns, "masked_head", "full_head", 1.3, {"batch": batch, "head_rows_share": share})


def mlm_packed(rounds: int = 9, batch: int = 4) -> None:
    """Packed lines and masked head against lines padded to the full length and full head."""
    texts = lines()
    lengths = np.array([len(row) for row in texts["input_ids"]])
    packed = pack_sequences(texts, LENGTH).shuffle(seed=0).with_format("numpy")
    collate = PackedCollator.for_model(roberta_base(), PAD, LENGTH)
    rows = [packed[index] for index in range(len(packed))]
    ours = [collate(rows[index : index + batch]) for index in range(0, len(rows) - batch, batch)]
    theirs = []
    order = texts.shuffle(seed=0).with_format("numpy")
    for index in range(0, len(order) - batch, batch):
        input_ids = torch.full((batch, LENGTH), PAD)
        for row, ids in enumerate(order[index : index + batch]["input_ids"]):
            input_ids[row, : len(ids)] = torch.from_numpy(ids)
        theirs.append({"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()})
    turns = race(
        {
            "packed": (train, {"batches": ours, "masked_head": True}),
            "padded": (train, {"batches": theirs, "masked_head": False}),
            "sgemm": (sgemm, {}),
        },
        rounds,
    )
    share = default_budget(batch, LENGTH, PROBABILITY) / (batch * LENGTH)
    extra = {
        "batch": batch,
        "mean_tokens_per_line": float(lengths.mean()),
        "positions_used_packed": float(lengths.sum() / (len(packed) * LENGTH)),
        "positions_used_padded": float(lengths.mean() / LENGTH),
        "head_rows_share": share,
    }
    _report("mlm_packed", turns, "packed", "padded", 5, extra)

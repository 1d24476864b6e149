"""Which masked positions a masked language model's head computes: a fixed number of rows for every batch.

At a masking probability of 15 % a head on all positions wastes six sevenths of its work. A head on the masked ones
alone would have another shape in every batch, and on a card with compiled graphs that is a compilation each. So the
number of rows is fixed, large enough to overflow less than once in a million batches, and the collator undoes the
surplus before the forward pass.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

IGNORE_INDEX = -100


@lru_cache
def default_budget(batch: int, length: int, probability: float, overflow: float = 1e-6) -> int:
    """The smallest number of masked tokens that a batch (batch, length) exceeds with a chance below `overflow`.

    Each token is masked on its own with `probability`, so the number in a whole batch is binomial. One limit for the
    flattened batch needs far fewer rows than one for each sequence. Tokens that are never masked (padding, special
    tokens) only make the true chance smaller.
    """
    tokens = batch * length
    if not 0 < probability < 1:
        return round(tokens * probability)
    odds = math.log(probability) - math.log1p(-probability)
    spread = math.sqrt(tokens * probability * (1 - probability))
    count = min(tokens, int(tokens * probability + 12 * spread + 40))  # what lies above is below 1e-20
    tail = 0.0
    while count > 0:
        log_ways = math.lgamma(tokens + 1) - math.lgamma(count + 1) - math.lgamma(tokens - count + 1)
        tail += math.exp(log_ways + count * odds + tokens * math.log1p(-probability))
        if tail >= overflow:
            break
        count -= 1
    return count


def limit_predictions(
    input_ids: Tensor, labels: Tensor, original_ids: Tensor, limit: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, int]:
    """Undo masks beyond `limit` in a batch: (input ids, labels, number undone); tensors (batch, length) int64.

    The surplus is drawn at random, so that no sequence of the batch is favoured, and gets its original token and the
    label -100 back. The arguments are not changed.
    """
    targets = (labels != IGNORE_INDEX).reshape(-1).nonzero().squeeze(1)
    surplus = len(targets) - limit
    if surplus <= 0:
        return input_ids, labels, 0
    undone = targets[torch.randperm(len(targets), generator=generator)[:surplus]]
    input_ids, labels = input_ids.clone().reshape(-1), labels.clone().reshape(-1)
    input_ids[undone] = original_ids.reshape(-1)[undone]
    labels[undone] = IGNORE_INDEX
    return input_ids.view_as(original_ids), labels.view_as(original_ids), surplus


def select_targets(labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The positions (rows,) in the flattened labels of the first `rows` targets, and their labels, in static shapes.

    Places that remain get position 0 and label -100. Needs no sort, no boolean index and no value on the host.
    """
    flat = labels.reshape(-1)
    rows = min(rows, flat.shape[0])
    chosen = flat != IGNORE_INDEX
    rank = chosen.cumsum(0) - 1
    slot = torch.where(chosen & (rank < rows), rank, rows)  # all others share one last place, which is cut off
    order = torch.arange(flat.shape[0], device=flat.device)
    positions = order.new_zeros(rows + 1).scatter_(0, slot, order)[:rows]
    targets = flat.new_full((rows + 1,), IGNORE_INDEX).scatter_(0, slot, flat)[:rows]
    return positions, targets

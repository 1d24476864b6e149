"""Run a training script on simulated cards and count what its steps take.

    GAUDI_SIMULATOR=1 python benchmarks/counting.py COUNTS run_clm.py FLAGS...

The script runs as it is. A callback, which transformers' Trainer gives to itself, looks at the card's counters between
steps. The first WARMUP steps are the warm-up; waits and bytes are those of the steps after the next one, at whose
beginning this suite starts its clock.
"""

import json
import os
import runpy
import sys
from collections import Counter
from pathlib import Path

from gaudi_lm.device import choose_card

choose_card(sys.argv[2:])

import torch
import transformers.trainer
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

WARMUP = 3
# What a rank sends in a ring of n, in units of (n - 1) / n of the bytes that the collective is about.
SHARES = {"allreduce_": 2, "barrier": 0}


def sent_bytes() -> float:
    """Bytes that a rank has sent, on average over the ranks."""
    from habana_frameworks.torch.hpu.metrics import collectives

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return sum(SHARES.get(name, 1) * size for name, (_, size) in collectives().items()) * (ranks - 1) / ranks


def total(name: str) -> int:
    """A counter of the card: `graph_compilation` or `host_sync`."""
    from habana_frameworks.torch.hpu.metrics import metric_global

    return dict(metric_global(name).stats())["TotalNumber"]


def tokens_of(batch: dict) -> int:
    """Tokens of a batch that are not padding; a mask may be of rows, or of pairs of tokens."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch["input_ids"].numel()
    mask = mask if mask.dim() == 2 else mask.diagonal(dim1=-2, dim2=-1)
    return int((mask == 0 if mask.is_floating_point() else mask != 0).sum())


class Counting(TrainerCallback):
    """Writes the counts of a run into a file, as JSON.

    - `graphs`, `graphs_after_warmup`: compiled until the last step's end;
    - `host_waits_per_step`, `sent_bytes_per_step`: means over the steps after the warm-up and one more;
    - `flop_per_token`: of an epoch, from its batches and the operations of a batch of each length;
    - `peak_memory_bytes`: of the card.
    """

    def __init__(self, file: Path):
        self.file = file
        self.found: dict[str, float] = {}
        self.flop = FlopCounterMode(display=False)
        self.flop_of_length: dict[int, int] = {}
        self.begun = (0, 0)  # length of the batch at work, operations before it

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        loader, self.batches, self.tokens = train_dataloader, Counter(), 0
        with torch.random.fork_rng(devices=[]):
            for numbers in loader.batch_sampler:
                batch = loader.collate_fn(loader.dataset.__getitems__(numbers))
                self.batches[batch["input_ids"].shape[1]] += 1
                self.tokens += tokens_of(batch)
        model.register_forward_pre_hook(lambda _, args, inputs: self.begin_batch(inputs), with_kwargs=True)
        self.flop.__enter__()

    def begin_batch(self, inputs: dict | None) -> None:
        """The operations of the batch before this one are over."""
        length, before = self.begun
        done = self.flop.get_total_flops()
        self.flop_of_length[length] = done - before
        self.begun = (inputs["input_ids"].shape[1] if inputs else 0, done)

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if step == WARMUP:
            self.graphs = total("graph_compilation")
        if step == WARMUP + 1:
            self.waits, self.sent = total("host_sync"), sent_bytes()
        if step == state.max_steps:
            self.begin_batch(None)
            steps = step - WARMUP - 1
            graphs = total("graph_compilation")
            flop = sum(count * self.flop_of_length[length] for length, count in self.batches.items())
            self.found = {
                "peak_memory_bytes": torch.hpu.max_memory_allocated(),
                "flop_per_token": flop / self.tokens,
                "graphs": graphs,
                "graphs_after_warmup": graphs - self.graphs,
                "host_waits_per_step": (total("host_sync") - self.waits) / steps,
                "sent_bytes_per_step": (sent_bytes() - self.sent) / steps,
            }

    def on_train_end(self, args, state, control, **kwargs):
        self.flop.__exit__(None, None, None)
        if state.is_world_process_zero:
            self.file.write_text(json.dumps(self.found))


if __name__ == "__main__":
    transformers.trainer.DEFAULT_CALLBACKS.append(Counting(Path(sys.argv[1])))
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")

"""Run a training script on simulated cards and count what its steps take.

    GAUDI_SIMULATOR=1 python benchmarks/counting.py COUNTS run_clm.py FLAGS...

The script runs as it is. A callback, which transformers' Trainer gives to itself, looks at the card's counters between
steps. Steps 1 to WARMUP are the warm-up; waits and bytes are those of the steps after the first one beyond it, where
this suite starts its clock; the last FLOP_STEPS steps are looked at from inside, which makes the host wait.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from gaudi_lm.device import choose_card

choose_card(sys.argv[2:])

import torch
import transformers.trainer
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

WARMUP = 3
FLOP_STEPS = 1
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


class Counting(TrainerCallback):
    """Writes the counts of a run into a file, as JSON.

    - `graphs`, `graphs_after_warmup`: compiled until the last steps, and between the warm-up and those;
    - `host_waits_per_step`, `sent_bytes_per_step`: means over the steps between the warm-up and the last steps;
    - `flop_per_token`, `tokens_per_step`: of the last steps; tokens that are not padding, of this rank;
    - `peak_memory_bytes`: of the card, until the last steps.
    """

    def __init__(self, file: Path):
        self.file = file
        self.found: dict[str, float] = {}
        self.flop = FlopCounterMode(display=False)
        self.tokens = 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step, last = state.global_step, state.max_steps - FLOP_STEPS
        if step == WARMUP:
            self.graphs = total("graph_compilation")
        if step == WARMUP + 1:
            self.begun = total("host_sync"), sent_bytes()
        if step == last:
            steps = last - WARMUP - 1
            graphs = total("graph_compilation")
            self.found = {
                "peak_memory_bytes": torch.hpu.max_memory_allocated(),
                "graphs": graphs,
                "graphs_after_warmup": graphs - self.graphs,
                "host_waits_per_step": (total("host_sync") - self.begun[0]) / steps,
                "sent_bytes_per_step": (sent_bytes() - self.begun[1]) / steps,
            }
            model.register_forward_pre_hook(self.count_tokens, with_kwargs=True)
            self.flop.__enter__()

    def count_tokens(self, model, args, inputs):
        mask = inputs.get("attention_mask")
        if mask is None:
            self.tokens += inputs["input_ids"].numel()
            return
        mask = mask if mask.dim() == 2 else mask.diagonal(dim1=-2, dim2=-1)
        self.tokens += int((mask == 0 if mask.is_floating_point() else mask != 0).sum())

    def on_train_end(self, args, state, control, **kwargs):
        self.flop.__exit__(None, None, None)
        self.found["flop_per_token"] = self.flop.get_total_flops() / self.tokens
        self.found["tokens_per_step"] = self.tokens / FLOP_STEPS
        if state.is_world_process_zero:
            self.file.write_text(json.dumps(self.found))


if __name__ == "__main__":
    transformers.trainer.DEFAULT_CALLBACKS.append(Counting(Path(sys.argv[1])))
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")

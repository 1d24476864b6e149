"""The simulated card against plain CPU tensors: one training step of a GPT-2 with 124M parameters, both in one run.

    GAUDI_SIMULATOR=1 python -m benchmarks.simulator_overhead --steps 7

Steps of the two alternate, so that a busy machine slows both. `python -m benchmarks simulator_overhead` runs this.
"""

import argparse
import statistics
import time

from gaudi_lm.device import choose_card

choose_card(["--use_habana", "--use_lazy_mode"])

import habana_frameworks.torch.core as htcore
import torch
from habana_frameworks.torch.hpex.optimizers import FusedAdamW
from transformers import GPT2Config, GPT2LMHeadModel

from .measure import write_report


class Run:
    """A model on a device, and the seconds of its steps."""

    def __init__(self, device: str, config: GPT2Config, rows: int, tokens: int):
        torch.manual_seed(0)
        self.model = GPT2LMHeadModel(config).to(device)
        self.optimizer = FusedAdamW(self.model.parameters(), lr=1e-4, weight_decay=0.01)
        self.device = device
        self.batch = torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self) -> None:
        start = time.perf_counter()
        inputs = self.batch.to(self.device)
        loss = self.model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "hpu":
            htcore.mark_step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick look")
    arguments = parser.parse_args()
    config = GPT2Config(n_layer=arguments.layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    runs = [Run(device, config, arguments.rows, arguments.tokens) for device in ("cpu", "hpu")]
    parameters = sum(p.numel() for p in runs[0].model.parameters())
    for _ in range(arguments.steps + 1):
        for run in runs:
            run.step()
    pairs = zip(*(run.seconds[1:] for run in runs), strict=True)
    ratio = statistics.median(card / cpu for cpu, card in pairs)
    same = runs[0].losses == runs[1].losses
    figures = {
        "parameters": parameters,
        "rows": arguments.rows,
        "tokens_in_a_row": arguments.tokens,
        "threads": torch.get_num_threads(),
        "cpu_seconds": statistics.median(runs[0].seconds[1:]),
        "simulated_card_seconds": statistics.median(runs[1].seconds[1:]),
        "losses_equal_to_the_bit": same,
    }
    write_report("simulator_overhead", ratio, "<= 1.15", ratio <= 1.15 and same, figures)


if __name__ == "__main__":
    main()

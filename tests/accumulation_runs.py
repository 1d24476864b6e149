"""Train tiny models of many families with different shares of a step: rows a batch, batches accumulated, ranks.

torchrun --nproc_per_node RANKS tests/accumulation_runs.py OUTPUT ROWSxSTEPS... -- FAMILY...

Writes OUTPUT: for each family and each ROWSxSTEPS, the losses and gradient norms of all steps and the final weights.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from gaudi_lm.runtime import choose_card, run_script

choose_card(["--use_cpu"])

import numpy as np
import torch
from datasets import Dataset
from tiny_models import CAUSAL, VOCABULARY, tiny_model

from gaudi_lm.arguments import TrainingArguments
from gaudi_lm.trainer import build_trainer

ROWS, LENGTH = 20, 16  # with 8 rows a step, the last step of an epoch has 4


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows with very different numbers of targets, as an average over batches instead of tokens would show."""
    input_ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    targets = torch.tensor([2 + row["draw"] % 13 for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.where(torch.arange(LENGTH) < targets[:, None], -100)}


def train(family: str, batch: int, accumulation: int) -> dict:
    data = np.random.default_rng(0).integers(3, VOCABULARY, (ROWS, LENGTH), dtype=np.int32)
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, do_train=True, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, num_train_epochs=2, logging_steps=1, save_strategy="no",
        optim="sgd", learning_rate=0.1, max_grad_norm=1.0, disable_tqdm=True,
    )  # fmt: skip
    trainer = build_trainer(
        tiny_model(family),
        "causal" if family in CAUSAL else "masked",
        args,
        None,
        collate,
        train_dataset=Dataset.from_dict({"input_ids": list(data)}),
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    return {"loss": [r["loss"] for r in logs], "grad_norm": [r["grad_norm"] for r in logs], "weights": weights}


def main() -> None:
    output, *shares = sys.argv[1 : sys.argv.index("--")]
    found = {}
    for name in sys.argv[sys.argv.index("--") + 1 :]:
        for share in shares:
            found[name, share] = train(name, *map(int, share.split("x")))
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, output)


if __name__ == "__main__":
    run_script(main)

"""Train tiny models of many families with different shares of a step: rows a batch, batches accumulated, ranks.

torchrun --nproc_per_node RANKS tests/support/accumulation_runs.py OUTPUT ROWSxSTEPS... -- FAMILY

A family is a model type, perhaps with an adapter: `llama+adalora`. Of a mixture of experts all rows hold the same
tokens, as the balance of its routers is no mean over rows: two batches of other rows have another balance than both
together.

Writes OUTPUT: for each ROWSxSTEPS the figures of all steps and of the run, and the final weights; for some families
also of runs that do not log each step.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from gaudi_lm.device import choose_card, run_script

choose_card(["--use_cpu"])

import numpy as np
import torch
from datasets import Dataset
from tiny_models import CAUSAL, VOCABULARY, tiny_model

from gaudi_lm.arguments.adapters import AdapterArguments
from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.modeling.adapters import adapter_config, add_adapter
from gaudi_lm.training.trainer import build_trainer

ROWS, LENGTH = 20, 16  # with 8 rows a step, the last step of an epoch has 4
EXPERTS = ("mixtral",)
ADALORA = {"adalora_init_r": 4, "adalora_target_r": 2, "adalora_tinit": 1, "adalora_tfinal": 2, "adalora_delta_t": 1}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows with very different numbers of targets, as an average over batches instead of tokens would show."""
    input_ids = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    targets = torch.tensor([2 + row["sample_id"] % 13 for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.where(torch.arange(LENGTH) < targets[:, None], -100)}


collate.needs_sample_id = True


def family_model(name: str) -> torch.nn.Module:
    model_type, _, adapter = name.partition("+")
    experts = {"output_router_logits": True, "router_aux_loss_coef": 0.5} if model_type in EXPERTS else {}
    model = tiny_model(model_type, **experts)
    if adapter:
        settings = AdapterArguments(peft_type=adapter, lora_dropout=0.0, lora_target_modules=["q_proj", "v_proj"])
        for flag, value in ADALORA.items():
            setattr(settings, flag, value)
        torch.manual_seed(1)
        model = add_adapter(model, adapter_config(settings), settings, tokenizer=None)
    return model


def train(family: str, batch: int, accumulation: int, **changes) -> dict:
    data = np.random.default_rng(0).integers(3, VOCABULARY, (ROWS, LENGTH), dtype=np.int32)
    if family.startswith(EXPERTS):
        data[:] = data[0]
    args = LMTrainingArguments(**{
        "output_dir": tempfile.mkdtemp(), "use_cpu": True, "do_train": True, "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation, "num_train_epochs": 2, "logging_steps": 1, "optim": "sgd",
        "save_strategy": "no", "learning_rate": 0.1, "max_grad_norm": 1.0, "disable_tqdm": True, **changes,
    })  # fmt: skip
    trainer = build_trainer(
        family_model(family),
        "causal" if family.partition("+")[0] in CAUSAL else "masked",
        args,
        None,
        collate,
        train_dataset=Dataset.from_dict({"input_ids": list(data)}),
    )
    output = trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    weights = {n: value.detach().clone() for n, value in trainer.model.named_parameters() if value.requires_grad}
    figures = ("loss", "grad_norm", "aux_loss", "orthogonality_loss")
    return {
        "weights": weights,
        "metrics": output.metrics,
        "training_loss": output.training_loss,
        **{name: [row[name] for row in logs] for name in figures if logs and name in logs[0]},
    }


def main() -> None:
    output, *shares, _, name = sys.argv[1:]
    found = {share: train(name, *map(int, share.split("x"))) for share in shares}
    if name == "gpt2" or name.startswith(EXPERTS) or "+" in name:
        # The log has four of the six steps, or none; the last step of an epoch has half of its rows.
        for when, steps in (("rare", 4), ("never", 100)):
            found[when] = train(name, *map(int, shares[0].split("x")), logging_steps=steps)
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, output)


if __name__ == "__main__":
    run_script(main)

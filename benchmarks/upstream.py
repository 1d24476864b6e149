"""Language modelling with a plain GaudiTrainer, as optimum-habana's documentation uses it: the other side of `price`.

    GAUDI_SIMULATOR=1 python benchmarks/upstream.py clm --model MODEL --data text.txt --length 1024 FLAGS...

Collators and losses are those of transformers: blocks of concatenated text with full logits, lines padded to the full
length and masked at random, instructions padded to the full length. FLAGS are those of GaudiTrainingArguments.
"""

import json
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from gaudi_lm.device import add_stand_in
from gaudi_lm.optimum_imports import answers_without_pip

add_stand_in()

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    default_data_collator,
)

with answers_without_pip():
    from optimum.habana import GaudiConfig, GaudiTrainer, GaudiTrainingArguments
    from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi


@dataclass
class Task:
    """What is trained on what."""

    task: str
    model: str
    data: str
    length: int
    lora_rank: int = 8


def blocks(texts: list[str], tokenizer, length: int) -> Dataset:
    tokens = list(chain.from_iterable(tokenizer(texts)["input_ids"]))
    rows = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * len(rows), "labels": rows})


def padded(texts: list[str], tokenizer, length: int, **more: bool) -> Dataset:
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length, **more)
    return Dataset.from_dict(dict(encoded))


def prompt(example: dict[str, str]) -> str:
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{example['instruction']}\n\n### Response:{example['output']}"
    )


def main() -> None:
    task, args = HfArgumentParser((Task, GaudiTrainingArguments)).parse_args_into_dataclasses()
    adapt_transformers_to_gaudi()
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    lines = Path(task.data).read_text().splitlines()
    kind = AutoModelForMaskedLM if task.task == "mlm" else AutoModelForCausalLM
    dtype = torch.bfloat16 if task.task == "lora" and args.bf16 else None
    model = kind.from_pretrained(task.model, torch_dtype=dtype, attn_implementation=args.attn_implementation)
    if task.task == "clm":
        data, collator = blocks(lines, tokenizer, task.length), default_data_collator
    elif task.task == "mlm":
        data = padded(lines, tokenizer, task.length, return_special_tokens_mask=True)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    else:
        data = padded([prompt(json.loads(line)) + tokenizer.eos_token for line in lines], tokenizer, task.length)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        model.config.use_cache = False
        model = get_peft_model(
            model,
            LoraConfig(
                r=task.lora_rank, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"],
                task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
    # As in Habana/gpt2 and Habana/roberta-base, and in optimum-habana's example of LoRA.
    gaudi_config = GaudiConfig(use_fused_adam=True, use_fused_clip_norm=True, use_torch_autocast=task.task != "lora")
    trainer = GaudiTrainer(
        model=model,
        gaudi_config=gaudi_config,
        args=args,
        train_dataset=data,
        data_collator=collator,
        processing_class=tokenizer,
    )
    trainer.train()


if __name__ == "__main__":
    sys.argv[1:2] = ["--task", sys.argv[1]]
    main()

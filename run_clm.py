#!/usr/bin/env python
"""Causal language modelling: fine-tune GPT-2, GPT-J, GPT-NeoX, Llama, ..., or train one from scratch.

    python run_clm.py --model_name_or_path gpt2 --dataset_name wikitext --dataset_config_name wikitext-2-raw-v1 \
        --do_train --do_eval --output_dir output/clm --use_habana --use_lazy_mode --gaudi_config_name Habana/gpt2
    python run_clm.py --model_type gpt2 --tokenizer_name gpt2 --train_file my.txt --do_train --output_dir new --use_cpu
    python run_clm.py configs/clm_gpt2.json --num_train_epochs 1

On a machine without a Gaudi, append --use_cpu, or set GAUDI_SIMULATOR=1 to rehearse on a simulated card.
"""

import sys
from dataclasses import dataclass, field

from gaudi_lm.device import UserError, choose_card, run_script

choose_card(sys.argv[1:], __name__)  # sets the environment that torch reads when it is imported

from gaudi_lm.arguments.definitions import DataArguments, LMTrainingArguments, ModelArguments
from gaudi_lm.arguments.parsing import check_flags_of_script, parse


@dataclass
class ScriptArguments:
    """What only this script needs."""

    model_type: str | None = field(
        default=None, metadata={"help": "Architecture of a model made from scratch, such as gpt2 or llama."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "With --model_type: changes such as n_embd=512,n_layer=6,resid_pdrop=0.2."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens in a block; by default what the model takes, 1024 at most."}
    )


ARGUMENTS = (ModelArguments, DataArguments, ScriptArguments, LMTrainingArguments)
check_flags_of_script(__name__, *ARGUMENTS)  # a wrong flag ends the run here, before slow imports

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from gaudi_lm.arguments.context_parallel import data_ranks
from gaudi_lm.data.blocks import group_into_blocks, tokenise
from gaudi_lm.data.columns import text_column
from gaudi_lm.data.loading import load_raw
from gaudi_lm.data.streams import StreamedBlocks, rank_share
from gaudi_lm.modeling.loading import fit_vocabulary, length_limit, load_config, load_model, load_tokenizer
from gaudi_lm.training.outputs import find_checkpoint, report, save, set_up, write_card
from gaudi_lm.training.trainer import build_trainer


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Blocks to a batch, int64 of shape ``[rows, block]``: ``input_ids``, and mask, positions and labels if any."""
    if "input_ids" not in rows[0]:
        raise UserError(f"rows have the columns {', '.join(rows[0])}: the tokens are to be in input_ids")
    names = [name for name in ("input_ids", "attention_mask", "position_ids", "labels") if name in rows[0]]
    if len(lengths := {len(row[name]) for row in rows for name in names}) > 1:
        raise UserError(
            f"{' and '.join(names)} have {' and '.join(map(str, sorted(lengths)))} tokens in one batch: make them "
            "equally long, or give build_trainer a collator that pads, such as DataCollatorForSeq2Seq(tokenizer)"
        )
    # Without labels, the trainer takes the tokens that are not padding.
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])).long() for name in names}


def make_blocks(
    texts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    block_size: int,
    limit: int | None,
    split: str,
    **options,
) -> Dataset:
    """Tokenise, concatenate and cut; no more is tokenised than ``limit`` blocks need."""
    max_tokens = None if limit is None else limit * block_size
    tokens = tokenise(texts, tokenizer, column, max_tokens=max_tokens, **options)
    return group_into_blocks(tokens, block_size, max_blocks=limit, split=split)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns all metrics."""
    # Arguments
    model_args, data_args, script_args, training_args = parse(argv, *ARGUMENTS)
    data_args.check(training_args.max_steps, do_train=training_args.do_train)

    # Set-up
    logger = set_up(training_args)
    checkpoint = find_checkpoint(training_args)

    # Data
    raw = load_raw(data_args, model_args, training_args.do_train, training_args.do_eval)
    columns = {split: text_column(texts, data_args.text_column_name) for split, texts in raw.items()}

    # Tokenizer and model
    config = load_config(model_args, script_args.model_type, script_args.config_overrides)
    tokenizer = load_tokenizer(model_args)
    fit_vocabulary(config, tokenizer, model_args.model_name_or_path is None, script_args.config_overrides)
    block_size = length_limit(
        "--block_size", script_args.block_size, tokenizer, config, parts=training_args.context_parallel_size
    )

    # Preprocessing
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    blocks = {}
    if data_args.streaming:
        for split, texts in raw.items():
            limit, column = limits[split], columns[split]
            if split == "train":
                texts, limit = rank_share(texts, column, limit, *data_ranks(training_args))
            blocks[split] = StreamedBlocks(
                texts, tokenizer, column, block_size, repeat=split == "train", max_rows=limit
            )
    else:
        with training_args.main_process_first(desc="preprocessing"):
            for split, texts in raw.items():
                blocks[split] = make_blocks(
                    texts,
                    tokenizer,
                    columns[split],
                    block_size,
                    limits[split],
                    split,
                    num_proc=data_args.preprocessing_num_workers,
                    use_cache=not (data_args.overwrite_cache and training_args.local_process_index == 0),
                )
    model = load_model(AutoModelForCausalLM, config, tokenizer, model_args, training_args)

    # Trainer
    trainer = build_trainer(
        model,
        "causal",
        training_args,
        tokenizer,
        collate_blocks,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
    )
    if training_args.dry_run:
        return trainer.dry_run()

    # Train
    metrics = {}
    if training_args.do_train:
        metrics.update(trainer.train(resume_from_checkpoint=checkpoint).metrics)
        report(trainer, "train", metrics)

    # Save
    if training_args.do_train:
        save(trainer, data_args.save_last_ckpt)

    # Evaluate
    if training_args.do_eval:
        evaluation = trainer.evaluate()
        report(trainer, "eval", evaluation)
        metrics.update(evaluation)

    # Card
    if training_args.do_train:
        write_card(trainer, task="text-generation", base_model=model_args.model_name_or_path, data=data_args)
    logger.info("done")
    return metrics


if __name__ == "__main__":
    run_script(main)

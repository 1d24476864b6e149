#!/usr/bin/env python
"""Masked language modelling: fine-tune RoBERTa, BERT, DistilBERT, ALBERT, ..., or train one from scratch.

    python run_mlm.py --model_name_or_path roberta-base --dataset_name wikitext \
        --dataset_config_name wikitext-2-raw-v1 --do_train --do_eval --output_dir output/mlm \
        --use_habana --use_lazy_mode --gaudi_config_name Habana/roberta-base
    python run_mlm.py --model_type bert --tokenizer_name bert-base-cased --train_file my.txt --line_by_line \
        --do_train --output_dir new --use_cpu
    python run_mlm.py configs/mlm_roberta.json --num_train_epochs 1

On a machine without a Gaudi, append --use_cpu, or set GAUDI_SIMULATOR=1 to rehearse on a simulated card.
"""

import sys
from dataclasses import dataclass, field, replace

from gaudi_lm.device import UserError, choose_card, run_script

choose_card(sys.argv[1:], __name__)  # sets the environment that torch reads when it is imported

from gaudi_lm.arguments.definitions import DataArguments, LMTrainingArguments, ModelArguments
from gaudi_lm.arguments.parsing import check_flags_of_script, parse

EVALUATION_SEED = 2022  # of the masks of every evaluation, whatever --seed is


@dataclass
class ScriptArguments:
    """What only this script needs."""

    model_type: str | None = field(
        default=None, metadata={"help": "Architecture of a model made from scratch, such as roberta or bert."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "With --model_type: changes such as hidden_size=256,num_hidden_layers=4."}
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens in a sequence; by default what the model takes, 1024 at most."}
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are masked."})
    line_by_line: bool = field(
        default=False, metadata={"help": "Each line is a sequence of its own, instead of blocks of concatenated text."}
    )
    pad_to_max_length: bool = field(
        default=False,
        metadata={
            "help": "With --line_by_line: pad to --max_seq_length. By default to the longest row of a batch on the "
            "CPU, and to one of at most four lengths on a Gaudi."
        },
    )
    pack_sequences: bool = field(
        default=False,
        metadata={"help": "With --line_by_line: pack several lines into a row of --max_seq_length, each kept apart."},
    )
    max_predictions_per_seq: int | None = field(
        default=None,
        metadata={
            "help": "Masked tokens for which the head is computed, per sequence; masks beyond are undone. By default "
            "the fewest that are exceeded once in a million batches; 0 computes the head everywhere."
        },
    )

    def check(self, streaming: bool) -> None:
        """Refuse what cannot work, by the flag's name."""
        for flag in ("pack_sequences", "pad_to_max_length"):
            if getattr(self, flag) and not self.line_by_line:
                raise UserError(f"--{flag} needs --line_by_line: blocks of concatenated text are full without it")
        if self.pack_sequences and streaming:
            raise UserError("--pack_sequences cannot be combined with --streaming: it sorts all lines by length")

    def masked_token_budget(self, rows: int, length: int) -> int:
        """How many masked tokens of a batch of this shape the head is computed for."""
        if self.max_predictions_per_seq is None:
            return default_budget(rows, length, self.mlm_probability)
        return min(rows * self.max_predictions_per_seq, rows * length)


ARGUMENTS = (ModelArguments, DataArguments, ScriptArguments, LMTrainingArguments)
check_flags_of_script(__name__, *ARGUMENTS)  # a wrong flag ends the run here, before slow imports

import pyarrow as pa
from datasets import Dataset
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from gaudi_lm.data.blocks import group_into_blocks, map_rows, to_list_array, tokenise
from gaudi_lm.data.columns import text_column, texts_of
from gaudi_lm.data.loading import load_raw
from gaudi_lm.data.masked_token_budget import default_budget
from gaudi_lm.data.masking import MaskingCollator, encode_lines, sequence_ends
from gaudi_lm.data.packing import PackedCollator, pack_sequences
from gaudi_lm.data.ragged import padded_lengths
from gaudi_lm.data.streams import StreamedBlocks, StreamedLines, rank_share
from gaudi_lm.modeling.loading import fit_vocabulary, length_limit, load_config, load_model, load_tokenizer
from gaudi_lm.training.outputs import find_checkpoint, report, save, set_up, write_card
from gaudi_lm.training.trainer import build_trainer


def make_blocks(
    texts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    size: int,
    limit: int | None,
    split: str,
    **options,
) -> Dataset:
    """Tokenise, concatenate and cut into blocks of ``size`` tokens, which leaves room for the sequence's two ends."""
    max_tokens = None if limit is None else limit * size
    tokens = tokenise(texts, tokenizer, column, add_special_tokens=False, max_tokens=max_tokens, **options)
    return group_into_blocks(tokens, size, max_blocks=limit, split=split)


def make_lines(
    texts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    size: int,
    limit: int | None,
    split: str,
    **options,
) -> Dataset:
    """Tokenise each text that is not blank on its own, its two ends included, at most ``size`` tokens."""

    def encode_rows(table: pa.Table) -> pa.Table:
        return pa.table({"input_ids": to_list_array(*encode_lines(texts_of(table, column), tokenizer, size))})

    lines = map_rows(texts, encode_rows, wanted=limit, **options)
    if not len(lines):
        raise UserError(f"the {split} data has only blank rows in column {column!r}")
    return lines.take(len(lines) if limit is None else min(limit, len(lines)))


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns all metrics."""
    # Arguments
    model_args, data_args, script_args, training_args = parse(argv, *ARGUMENTS)
    data_args.check(training_args.max_steps, do_train=training_args.do_train)
    script_args.check(data_args.streaming)

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
    max_length = length_limit("--max_seq_length", script_args.max_seq_length, tokenizer, config)
    start, end = sequence_ends(tokenizer, max_length, need_padding=script_args.line_by_line)

    # Preprocessing
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    size = max_length if script_args.line_by_line else max_length - len(start) - len(end)
    rows = {}
    if data_args.streaming:
        for split, texts in raw.items():
            limit, column = limits[split], columns[split]
            if split == "train":
                ranks = training_args.process_index, training_args.world_size
                texts, limit = rank_share(texts, column, limit, *ranks)
            source, options = (texts, tokenizer, column, size), {"repeat": split == "train", "max_rows": limit}
            if script_args.line_by_line:
                rows[split] = StreamedLines(*source, **options)
            else:
                rows[split] = StreamedBlocks(*source, add_special_tokens=False, **options)
    else:
        make_rows = make_lines if script_args.line_by_line else make_blocks
        with training_args.main_process_first(desc="preprocessing"):
            for split, texts in raw.items():
                rows[split] = make_rows(
                    texts,
                    tokenizer,
                    columns[split],
                    size,
                    limits[split],
                    split,
                    num_proc=data_args.preprocessing_num_workers,
                    use_cache=not (data_args.overwrite_cache and training_args.local_process_index == 0),
                )
        if script_args.pack_sequences:
            step = training_args.rows_per_step
            rows = {s: pack_sequences(lines, max_length, split=s, rows_per_step=step) for s, lines in rows.items()}
    model = load_model(AutoModelForMaskedLM, config, tokenizer, model_args, training_args)

    # Masking
    collator = MaskingCollator(
        tokenizer,
        script_args.mlm_probability,
        mask_share=0.8,
        random_share=0.1,
        # Ranks of a stream number their rows alike.
        seed=(training_args.seed, training_args.process_index if data_args.streaming else 0),
        masked_token_budget=None if script_args.max_predictions_per_seq == 0 else script_args.masked_token_budget,
    )
    if script_args.pack_sequences:
        collator.assemble = PackedCollator.for_model(model, tokenizer.pad_token_id, max_length)
    elif script_args.line_by_line:
        collator.lengths = padded_lengths(rows.values(), max_length, script_args.pad_to_max_length, training_args)
    else:
        collator.start, collator.end = start, end

    # Trainer
    trainer = build_trainer(
        model,
        "masked",
        training_args,
        tokenizer,
        collator,
        train_dataset=rows.get("train"),
        eval_dataset=rows.get("validation"),
        evaluation_collator=replace(collator, seed=(EVALUATION_SEED,)),
        max_predictions_per_seq=collator.masked_token_budget,
    )
    if training_args.dry_run:
        return trainer.dry_run()

    # Train
    metrics = {}
    if training_args.do_train:
        metrics.update(trainer.train(resume_from_checkpoint=checkpoint).metrics)
        if collator.undone:
            logger.info("%d masks beyond --max_predictions_per_seq were undone", collator.undone)
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
        write_card(trainer, task="fill-mask", base_model=model_args.model_name_or_path, data=data_args)
    logger.info("done")
    return metrics


if __name__ == "__main__":
    run_script(main)

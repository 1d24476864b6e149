#!/usr/bin/env python
"""LoRA and its relatives: tune Llama and other causal models on instructions and answers.

    python run_lora_clm.py --model_name_or_path huggyllama/llama-7b --dataset_name tatsu-lab/alpaca --bf16 True \
        --dataset_concatenation --do_train --output_dir output/lora --use_habana --use_lazy_mode
    python run_lora_clm.py --model_name_or_path my_model --train_file my.jsonl --train_on_inputs False \
        --lora_target_modules all-linear --do_train --merge_adapter --output_dir tuned --use_cpu
    python run_lora_clm.py configs/lora_llama.json --num_train_epochs 1

On a machine without a Gaudi, append --use_cpu, or set GAUDI_SIMULATOR=1 to rehearse on a simulated card.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from gaudi_lm.device import UserError, choose_card, run_script

choose_card(sys.argv[1:], __name__)  # sets the environment that torch reads when it is imported

from gaudi_lm.arguments.adapters import AdapterArguments
from gaudi_lm.arguments.definitions import DataArguments, LMTrainingArguments, ModelArguments
from gaudi_lm.arguments.parsing import check_flags_of_script, parse

# The prompts of Stanford Alpaca (Taori et al. 2023), which many instruction models were tuned with.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
SQL = (
    "Answer the question about a database with one SQL query. The context holds the statements that made its "
    "tables.\n\n### Question:\n{instruction}\n\n### Context:\n{input}\n\n### SQL:"
)


@dataclass
class LoraModelArguments(ModelArguments):
    """The model that is tuned, and its adapter."""

    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "A saved adapter to evaluate, or to continue training; its own settings hold."}
    )
    use_fused_rope: bool = field(
        default=True, metadata={"help": "Rotary embeddings by Habana's fused kernel, where the model has them."}
    )
    load_meta_device: bool = field(
        default=False, metadata={"help": "Load the weights straight onto the card, not into host memory first."}
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Also write the whole model, the adapter merged in, to OUTPUT_DIR/merged."}
    )


@dataclass
class LoraDataArguments(DataArguments):
    """The examples."""

    validation_split_percentage: int = field(
        default=0, metadata={"help": "Percentage of the training rows kept for validation where there is no such set."}
    )
    max_seq_length: int = field(default=512, metadata={"help": "Tokens of an example; longer ones are truncated."})
    pad_to_max_length: bool = field(
        default=False,
        metadata={
            "help": "Pad to --max_seq_length. By default to the longest row of a batch on the CPU, and to one of at "
            "most four lengths on a Gaudi."
        },
    )
    dataset_concatenation: bool = field(
        default=False, metadata={"help": "Concatenate the examples and cut them into blocks of --max_seq_length."}
    )
    train_on_inputs: bool = field(
        default=True, metadata={"help": "Train on the prompts too, not only on the responses."}
    )
    sql_prompt: bool = field(
        default=False, metadata={"help": "Questions about a database, with columns question, context and answer."}
    )
    chat_prompt: bool = field(
        default=False, metadata={"help": "Format instruction and response with the tokenizer's chat template."}
    )
    instruction_column_name: str | None = field(
        default=None, metadata={"help": "Column of the instructions, if not `instruction`."}
    )
    input_column_name: str | None = field(
        default=None, metadata={"help": "Column of the inputs that go with them, if not `input`."}
    )
    output_column_name: str | None = field(default=None, metadata={"help": "Column of responses, if not `output`."})
    dataset_seed: int = field(default=42, metadata={"help": "Seed of the split by --validation_split_percentage."})
    dataset_cache_directory: str | None = field(default=None, metadata={"help": "As --cache_dir, for datasets only."})
    keep_in_memory: bool = field(default=False, metadata={"help": "Keep tokenised data in memory, not on disk."})
    pack_sequences: bool = field(
        default=False, metadata={"help": "Pack several examples into a row of --max_seq_length, each kept apart."}
    )

    def check(self, max_steps: int, allow_no_split: bool = True, do_train: bool = True) -> None:
        """Refuse what cannot work, by the flag's name."""
        if self.streaming:
            raise UserError("--streaming: run_lora_clm.py prepares all examples first; leave the flag out")
        super().check(max_steps, allow_no_split, do_train)
        for left, right in (("sql_prompt", "chat_prompt"), ("dataset_concatenation", "pack_sequences")):
            if getattr(self, left) and getattr(self, right):
                raise UserError(f"--{left} and --{right} exclude each other")


ARGUMENTS = (LoraModelArguments, LoraDataArguments, AdapterArguments, LMTrainingArguments)
check_flags_of_script(__name__, *ARGUMENTS)  # a wrong flag ends the run here, before slow imports

from transformers import AutoModelForCausalLM

from gaudi_lm.data.instructions import collate_examples, tokenise_examples
from gaudi_lm.data.loading import load_raw
from gaudi_lm.data.packing import PackedCollator, pack_sequences
from gaudi_lm.data.prompts import check_tokenizer, find_format, log_formats
from gaudi_lm.data.ragged import padded_lengths
from gaudi_lm.modeling.adapters import adapter_config, add_adapter, load_adapter
from gaudi_lm.modeling.loading import length_limit, load_config, load_model, load_tokenizer
from gaudi_lm.training.merging import check_base_model, save_merged
from gaudi_lm.training.outputs import find_checkpoint, report, save, set_up, write_card
from gaudi_lm.training.trainer import build_trainer


def format_example(row: dict[str, str], sql: bool = False) -> tuple[str, str]:
    """Prompt and response of a row, from its ``instruction``, ``input`` (blank where there is none) and ``output``."""
    template = SQL if sql else WITH_INPUT if row["input"].strip() else WITHOUT_INPUT
    return template.format(**row), row["output"]


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run the script; returns all metrics."""
    # Arguments
    model_args, data_args, adapter_args, training_args = parse(argv, *ARGUMENTS)
    data_args.check(training_args.max_steps)
    check_base_model(model_args, adapter_args.peft_type, training_args)
    adapter = adapter_config(adapter_args, model_args.adapter_name_or_path)

    # Set-up
    logger = set_up(training_args)
    checkpoint = find_checkpoint(training_args)

    # Data
    cache = replace(model_args, cache_dir=data_args.dataset_cache_directory or model_args.cache_dir)
    raw = load_raw(data_args, cache, training_args.do_train, training_args.do_eval, data_args.dataset_seed)
    formats = {
        split: find_format(
            examples, sql_prompt=data_args.sql_prompt, chat_prompt=data_args.chat_prompt,
            text_column=data_args.text_column_name, instruction=data_args.instruction_column_name,
            input=data_args.input_column_name, output=data_args.output_column_name,
        )
        for split, examples in raw.items()
    }  # fmt: skip
    log_formats(formats.values())

    # Tokenizer and model
    config = load_config(model_args)
    tokenizer = load_tokenizer(model_args)
    for example_format in formats.values():
        check_tokenizer(example_format, tokenizer, data_args.train_on_inputs)
    parts, virtual = training_args.context_parallel_size, getattr(adapter, "num_virtual_tokens", None) or 0
    max_length = length_limit(
        "--max_seq_length", data_args.max_seq_length, tokenizer, config, parts=parts, virtual_tokens=virtual
    )

    # Preprocessing
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    rows = {}
    with training_args.main_process_first(desc="preprocessing"):
        for split, examples in raw.items():
            rows[split] = tokenise_examples(
                examples, formats[split], tokenizer, max_length,
                format_example=partial(format_example, sql=data_args.sql_prompt),
                train_on_inputs=data_args.train_on_inputs,
                concatenate=data_args.dataset_concatenation,
                limit=limits[split],
                split=split,
                stop_ids=config.eos_token_id,
                num_proc=data_args.preprocessing_num_workers,
                use_cache=not (data_args.overwrite_cache and training_args.local_process_index == 0),
                keep_in_memory=data_args.keep_in_memory,
            )  # fmt: skip
    if training_args.bf16 and model_args.torch_dtype is None:
        model_args.torch_dtype = "bfloat16"  # frozen weights lose nothing by it; peft keeps the adapter in fp32
    device = {"device_map": training_args.device.type} if model_args.load_meta_device else {}
    model = load_model(AutoModelForCausalLM, config, tokenizer, model_args, training_args, **device)

    # Adapter
    if training_args.gradient_checkpointing:
        model.enable_input_require_grads()
    if model_args.adapter_name_or_path:
        model = load_adapter(model, model_args.adapter_name_or_path, training_args.do_train)
    elif training_args.do_train:
        model = add_adapter(model, adapter, adapter_args, tokenizer)

    # Trainer
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collator: Callable[[list[dict]], dict]
    if data_args.pack_sequences:
        step = training_args.rows_per_step
        rows = {s: pack_sequences(texts, max_length, split=s, rows_per_step=step) for s, texts in rows.items()}
        collator = PackedCollator.for_model(model, padding, max_length)
    else:
        full = data_args.pad_to_max_length or data_args.dataset_concatenation
        lengths = padded_lengths(rows.values(), max_length, full, training_args)
        collator = partial(collate_examples, padding=padding, lengths=lengths)
    trainer = build_trainer(
        model, "causal", training_args, tokenizer, collator,
        train_dataset=rows.get("train"), eval_dataset=rows.get("validation"),
    )  # fmt: skip
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
    if model_args.merge_adapter:
        save_merged(trainer)

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

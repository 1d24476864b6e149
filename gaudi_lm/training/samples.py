"""What a model is shown, and what it has learnt, as text."""

from __future__ import annotations

import inspect
import itertools
import logging
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline

from gaudi_lm.architectures import architecture_of
from gaudi_lm.data.instructions import show_targets
from gaudi_lm.data.masked_token_budget import IGNORE_INDEX
from gaudi_lm.data.sampling import ignore_filler_samples
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.loss import logits_of
from gaudi_lm.training.evaluation import EvaluationRows

if TYPE_CHECKING:
    from gaudi_lm.training.trainer import LMTrainer

logger = logging.getLogger("gaudi_lm")

SHOWN = 2000  # characters of a sample
NEW_TOKENS = 40
CANDIDATES = 3  # for a mask


def _new_tokens(prompt: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens follow a prompt, within what the model takes; negative where the prompt alone is too long."""
    config, adapter = model.config, getattr(model, "active_peft_config", None)
    first = architecture_of(config).position_of_first_token(config)
    first += getattr(adapter, "num_virtual_tokens", None) or 0
    limit = (getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length) - first
    return min(NEW_TOKENS, min(limit, tokenizer.model_max_length) - len(tokenizer(prompt)["input_ids"]))


def check_prompts(training_args, causal: bool, model: PreTrainedModel, tokenizer) -> None:
    """Before training: a UserError for a prompt that is empty or too long, or lacks a mask for a masked model."""
    if training_args.generate and training_args.fsdp and not causal:
        raise UserError("--generate: not with --fsdp, which divides the weights; fill masks with the saved model")
    for prompt in training_args.generate or []:
        if not causal and tokenizer.mask_token not in prompt:
            raise UserError(f"--generate {prompt!r}: it has no {tokenizer.mask_token} for the model to fill")
        if not prompt or _new_tokens(prompt, model, tokenizer) < causal:
            raise UserError(f"--generate {prompt!r}: it is {'longer than the model takes' if prompt else 'empty'}")


def show_samples(trainer: LMTrainer) -> None:
    """Log the first ``--show_examples`` samples, the tokens of the loss (of masks those behind them) marked."""
    tokenizer = trainer.processing_class
    if tokenizer is None or trainer.train_dataset is None or not trainer.is_world_process_zero():
        return
    collate = ignore_filler_samples(trainer.data_collator, labels_from_inputs=trainer.causal)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    samples = EvaluationRows(trainer.train_dataset, 1, 0, 1)
    for number, sample in enumerate(itertools.islice(samples, trainer.args.show_examples)):
        batch = collate([sample])
        input_ids, labels = batch["input_ids"][0], batch["labels"][0]
        used = torch.nonzero((input_ids != padding) | (labels != IGNORE_INDEX))[-1] + 1
        text = show_targets({"input_ids": input_ids[:used], "labels": labels[:used]}, tokenizer)
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]} [...] {text[-SHOWN // 2 :]}"
        logger.info("sample %d, the tokens of the loss between >>> and <<<: %r", number, text)


@torch.no_grad()
def most_probable_tokens(model: PreTrainedModel, input_ids: list[int], new_tokens: int, end: list[int]) -> list[int]:
    """What a causal model on a card continues with, without the tokens of ``end``, of which one ends it.

    ``generate`` of optimum-habana 1.21 goes wrong with models that are not its own, Phi-3 and transformers' Gemma
    among them, and with its OPT, Gemma 3 and windows. This is the forward pass of training at one length: one graph.
    """
    row = torch.zeros(1, len(input_ids) + new_tokens, dtype=torch.long)
    row[0, : len(input_ids)] = torch.tensor(input_ids)
    for position in range(len(input_ids), row.shape[1]):
        inputs = {"input_ids": row, "attention_mask": (torch.arange(row.shape[1]) < position).long()[None]}
        on_card = {name: value.to(model.device) for name, value in inputs.items()}
        logits = logits_of(model, model(**on_card, use_cache=False))
        token = int(logits[0, position - 1].argmax())
        if token in end:
            return row[0, len(input_ids) : position].tolist()
        row[0, position] = token
    return row[0, len(input_ids) :].tolist()


def generate(trainer: LMTrainer, task: str) -> list[tuple[str, str]]:
    """Each prompt of ``--generate`` with its most probable continuation, or with what fills its masks; logged too.

    Args:
        task: that of a pipeline of transformers, ``text-generation`` or ``fill-mask``.
    """
    answers: list[tuple[str, str]] = []
    if not (prompts := trainer.args.generate):
        return answers
    logging.getLogger("transformers.pipelines.base").setLevel(logging.CRITICAL)  # it takes a Gaudi model for unknown
    model, tokenizer = trainer.plain_model.eval(), trainer.processing_class
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # A class of one's own may have no generate, or none that works without keys and values of earlier tokens.
    generates = base.can_generate() and "past_key_values" in inspect.signature(base.forward).parameters
    on_cpu = trainer.args.device.type == "cpu" and not trainer.is_fsdp_enabled
    token_by_token = task != "fill-mask" and not (on_cpu and generates)
    device = None if hasattr(base, "hf_device_map") else trainer.args.device  # of --load_meta_device: it is there
    run = None if token_by_token else pipeline(task, model=model, tokenizer=tokenizer, device=device)
    for prompt in prompts:
        if run is None:
            end = getattr(base.generation_config, "eos_token_id", tokenizer.eos_token_id)
            ids, new_tokens = tokenizer(prompt)["input_ids"], _new_tokens(prompt, model, tokenizer)
            end = end if isinstance(end, list) else [end]
            tokens = most_probable_tokens(trainer.computing_model, ids, new_tokens, end)
            # Together with the prompt: some tokenizers drop a space where a text begins.
            before, text = tokenizer.batch_decode([ids, ids + tokens], skip_special_tokens=True)
            answers.append((prompt, text.removeprefix(before)))
        elif task == "fill-mask":
            found = run(prompt, top_k=CANDIDATES)
            masks = found if isinstance(found[0], list) else [found]
            words = [", ".join(f"{one['token_str'].strip()} ({one['score']:.2f})" for one in mask) for mask in masks]
            answers.append((prompt, "; ".join(words)))
        else:
            options = {"max_new_tokens": _new_tokens(prompt, model, tokenizer), "return_full_text": False}
            (found,) = run(prompt, do_sample=False, temperature=1.0, pad_token_id=tokenizer.eos_token_id, **options)
            answers.append((prompt, found["generated_text"]))
        logger.info("%r -> %r", *answers[-1])
    return answers

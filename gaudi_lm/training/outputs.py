"""What stands around training in all scripts: set-up, the checkpoint to go on from, results, final save, card."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path

import torch
from optimum.habana.utils import check_synapse_version, set_seed
from transformers.utils.logging import get_log_levels_dict

from gaudi_lm.arguments.deepspeed_configs import check_saved_form
from gaudi_lm.arguments.definitions import LMTrainingArguments
from gaudi_lm.device import set_up_logging
from gaudi_lm.modeling.patches import patch_libraries
from gaudi_lm.optimum_imports import answers_without_pip
from gaudi_lm.training.agreement import gather
from gaudi_lm.training.checkpoints import STATE
from gaudi_lm.training.custom_parts import as_json
from gaudi_lm.training.device_metrics import DEVICE_FIGURES
from gaudi_lm.training.metrics import save_loss_curve
from gaudi_lm.training.model_card import write_model_card
from gaudi_lm.training.rank_settings import check_settings
from gaudi_lm.training.resume import find_checkpoint as find_checkpoint  # for the scripts
from gaudi_lm.training.samples import generate
from gaudi_lm.training.trainer import LMTrainer

logger = logging.getLogger("gaudi_lm")

UNITS = {"_loss": "nats/token", "_runtime": "s", "_gb": "GiB", "_flos": "FLOP", "_delta": "bytes"}


def set_up(training_args: LMTrainingArguments) -> logging.Logger:
    """Ranks that agree, logging, the words that the chosen card deserves, patches of libraries, and the seed."""
    check_settings()
    main = training_args.process_index == 0
    if main and training_args.device.type == "hpu":
        with answers_without_pip():
            check_synapse_version()  # a warning, where optimum-habana was not tried with this driver
    name = training_args.log_level if main else training_args.log_level_replica
    unwanted = training_args.disable_tqdm and "disable_tqdm" in training_args.chosen
    set_up_logging(main, get_log_levels_dict().get(name), bars=not unwanted)
    if training_args.overridden_flags:
        logger.info("--use_cpu overrides %s", ", ".join(training_args.overridden_flags))
    on_card = training_args.device.type == "hpu"
    plain = "precision by the Gaudi or DeepSpeed configuration" if on_card else "fp32"
    logger.info(
        "%d %s, %s",
        training_args.world_size,
        ("card" if on_card else "CPU process") + ("" if training_args.world_size == 1 else "s" if on_card else "es"),
        "bf16 autocast" if training_args.bf16 else plain,
    )
    if training_args.use_cpu and training_args.bf16:
        _warn_slow_bf16()
    check_saved_form(training_args)
    patch_libraries(training_args.device.type)
    set_seed(training_args.seed)
    return logger


def _warn_slow_bf16() -> None:
    """Measure a bf16 product against an fp32 one: on processors without bf16 instructions it is many times slower."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(512, 512, dtype=dtype)
        left @ left
        start = time.perf_counter()
        left @ left
        seconds[dtype] = time.perf_counter() - start
    factor = seconds[torch.bfloat16] / seconds[torch.float32]
    if factor > 1.5:
        logger.warning(
            "--bf16 on this processor, which has no fast bf16 instructions: "
            "a bf16 matrix product took %.0f times as long as an fp32 one just now; leave --bf16 out for speed",
            factor,
        )


def highest_of_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """Of figures that each rank has for itself, times and those of its card, the highest; the others are of all."""
    own = {name for name in metrics if name.endswith("_runtime") or name in DEVICE_FIGURES}
    ranks = gather({name: metrics[name] for name in own})
    return {name: max(rank.get(name, 0.0) for rank in ranks) for name in own}


def report(trainer: LMTrainer, split: str, metrics: dict[str, float]) -> None:
    """Write figures to ``<split>_results.json`` and ``all_results.json``, and log those of the run as one block.

    The block comes with the evaluation, where one follows the training. On a card, its own figures are among them:
    graphs compiled, waits of the host, memory. All ranks must call it.
    """
    if split == "train" and hasattr(trainer.train_dataset, "__len__"):
        metrics["train_samples"] = len(trainer.train_dataset)
    metrics.update(as_json(metrics, "report takes") | trainer.device_metrics.figures())
    metrics.update(highest_of_ranks(metrics))
    trainer.results.update(metrics)
    if split != "train" or not trainer.args.do_eval:
        for line in aligned(trainer.results):
            logger.info(line)
    for line in trainer.device_metrics.report_lines():
        logger.warning(line)
    total = Path(trainer.args.output_dir) / "all_results.json"
    with trainer.files_at_top() as staging:
        if trainer.is_world_process_zero():
            earlier = _read_json(total)
            if split == "train" and trainer.state.global_step > trainer.resumption.step:
                # An evaluation before these steps was of another model.
                (total.parent / "eval_results.json").unlink(missing_ok=True)
                earlier = {name: value for name, value in earlier.items() if not name.startswith("eval_")}
            _write_json(staging / f"{split}_results.json", metrics)
            _write_json(staging / total.name, {**earlier, **metrics})


def aligned(metrics: dict[str, float]) -> list[str]:
    """Figures in lines of equal width, with units where the name does not say them."""
    values = {
        name: f"{value:,.6g}" if isinstance(value, (int, float)) else str(value) for name, value in metrics.items()
    }
    names, numbers = (max(map(len, words), default=0) for words in (values, values.values()))
    units = {name: next((unit for end, unit in UNITS.items() if name.endswith(end)), "") for name in values}
    return [f"  {name:<{names}}  {values[name]:>{numbers}} {units[name]}".rstrip() for name in sorted(values)]


def _write_json(path: Path, values: dict) -> None:
    # JSON has no NaN and no infinity: many readers refuse a file with them.
    known = json.loads(json.dumps(values), parse_constant=lambda name: None)
    path.write_text(json.dumps(known, indent=4, sort_keys=True) + "\n")


def _read_json(path: Path) -> dict:
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):  # written by another tool
        return dict(json.loads(path.read_text()))
    return {}


def save(trainer: LMTrainer, save_model: bool = True) -> None:
    """Model, tokenizer and trainer state at the top of ``output_dir``: before anything else can go wrong."""
    with trainer.files_at_top() as staging:
        if save_model:
            trainer.save_model(str(staging), _internal_call=True)
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(staging / STATE))
    args, state = trainer.args, trainer.state
    if args.load_best_model_at_end and state.best_model_checkpoint:
        best = (state.best_global_step, state.global_step, args.metric_for_best_model, state.best_metric)
        logger.info("the model is that of step %d of %d, the best by %s (%.6g)", *best)
    elif args.load_best_model_at_end:
        logger.warning("--load_best_model_at_end: no evaluation found a best model; this is that of the last step")
    merged, anew = Path(args.output_dir, "merged"), getattr(args, "flags", {}).get("merge_adapter")
    if state.global_step > trainer.resumption.step and (merged / "config.json").is_file() and not anew:
        logger.warning("%s is from an earlier run, without this adapter; --merge_adapter writes it anew", merged)
    trainer.signals.end_after_training(Path(args.output_dir))


def write_card(trainer: LMTrainer, **card) -> None:
    """Model card and loss curve of a trained model, evaluation included, and the trainer state with it.

    Args:
        card: passed to :func:`gaudi_lm.training.model_card.write_model_card`.
    """
    folder = Path(trainer.args.output_dir)
    card["samples"] = generate(trainer, card["task"])
    with trainer.files_at_top() as staging:
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(staging / STATE))
            drawn = save_loss_curve(trainer.state.log_history, staging / "loss_curve.png")
            write_model_card(trainer, staging / "README.md", title=folder.resolve().name, curve=drawn, **card)
    logger.info("Outputs saved to %s", os.path.abspath(folder))
    trainer.trackers.close()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()

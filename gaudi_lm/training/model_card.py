"""The model card: what was trained, on what, how, and how well."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path

import datasets
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

SHOWN = (
    "learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "world_size", "optim", "weight_decay", "max_grad_norm", "warmup_ratio", "seed",
)  # fmt: skip
RESULTS = ("eval_loss", "eval_perplexity", "eval_accuracy")


def command_line() -> str:
    """The command of this process, to be pasted into a shell; the values of tokens are left out."""
    words, hide = [], False
    for word in sys.argv:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--") and name.endswith("token")
        words.append("<hidden>" if hide else f"{name}=<hidden>" if secret and equals else word)
        hide = secret and not equals
    return shlex.join(["python", *words]).replace("'<hidden>'", "<hidden>")


def write_model_card(
    trainer,
    path: Path,
    title: str,
    curve: bool,
    task: str,
    base_model: str | None,
    data: str,
    library: str = "transformers",
) -> None:
    """Write a model card.

    Args:
        path: of the ``README.md``.
        title: its heading.
        curve: whether ``loss_curve.png`` will lie beside it.
        task: the hub's name of the task, such as ``text-generation``.
        base_model: hub name or folder of the model that was fine-tuned; None for one from scratch.
        data: the data in a few words.
        library: with which the result is loaded, ``transformers`` or ``peft``.
    """
    args = trainer.args
    on_hub = base_model is not None and not Path(base_model).exists()
    meta = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        base_model=base_model if on_hub else None,
        tags=["gaudi-lm", "generated_from_trainer"],
        metrics=["perplexity", "accuracy"],
    )
    logged = next((row for row in reversed(trainer.state.log_history) if "eval_loss" in row), {})
    rows = [("optimizer steps", trainer.state.global_step)]
    rows += [(name.replace("_", " "), f"{logged[name]:.4f}") for name in RESULTS if name in logged]
    settings = [(name, getattr(args, name)) for name in SHOWN]
    versions = [("torch", torch), ("transformers", transformers), ("datasets", datasets)]
    origin = f"Fine-tuned from `{base_model}`" if base_model else "Trained from scratch"
    lines = [
        f"---\n{meta.to_yaml()}\n---",
        f"\n# {title}\n",
        f"{origin} on {data} with gaudi-lm ({'Gaudi' if args.use_habana else 'CPU'}).\n",
        "## Command\n",
        f"```bash\n{command_line()}\n```\n",
        "## Results\n",
        "| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "\n![loss curve](loss_curve.png)\n" if curve else "",
        "## Settings\n",
        "| | |\n|---|---|",
        *(f"| {name} | {getattr(value, 'value', value)} |" for name, value in settings),
        f"\nPython {platform.python_version()}, "
        + ", ".join(f"{name} {module.__version__}" for name, module in versions)
        + ".\n",
    ]
    ModelCard("\n".join(lines), ignore_metadata_errors=True).save(path)

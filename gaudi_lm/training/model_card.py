"""The model card: what was trained, on what, how, and how well."""

from __future__ import annotations

import contextlib
import math
import platform
import re
import shlex
import sys
from pathlib import Path
from textwrap import indent

import datasets
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel

from gaudi_lm.arguments.definitions import DataArguments
from gaudi_lm.training.metrics import is_result
from gaudi_lm.variables import is_secret_flag

SHOWN = (
    "learning_rate", "lr_scheduler_type", "per_device_train_batch_size",
    "gradient_accumulation_steps", "world_size", "optim", "weight_decay", "max_grad_norm", "warmup_ratio", "seed",
)  # fmt: skip
CODE = "    "  # what Markdown takes for code, whatever it holds


def without_secrets(argv: list[str]) -> list[str]:
    """The words of a command line, ``<hidden>`` in place of the values of tokens."""
    words, hide = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        secret = is_secret_flag(word)
        words.append("<hidden>" if hide else f"{name}=<hidden>" if secret and equals else word)
        hide = secret and not equals
    return words


def command_line() -> str:
    """The command of this process, to be pasted into a shell; the values of tokens are left out."""
    return shlex.join(["python", *without_secrets(sys.argv)]).replace("'<hidden>'", "<hidden>")


def write_model_card(
    trainer,
    path: Path,
    title: str,
    curve: bool,
    task: str,
    base_model: str | None,
    data: DataArguments,
    samples: list[tuple[str, str]],
) -> None:
    """Write a model card.

    Args:
        path: of the ``README.md``.
        title: its heading.
        curve: whether ``loss_curve.png`` will lie beside it.
        task: the hub's name of the task, such as ``text-generation``.
        base_model: hub name or folder of the model that was fine-tuned; None for one from scratch.
        data: what was trained and evaluated on.
        samples: prompts, and what the trained model makes of them.
    """
    args, state = trainer.args, trainer.state
    on_hub = base_model is not None and not Path(base_model).exists()
    dataset = data.dataset_name if data.dataset_name and not Path(data.dataset_name).exists() else None
    # Of several sets, a row each; an evaluation before the last step was of another model.
    last = [row for row in state.log_history if row["step"] == state.global_step]
    figures = {name: value for row in last for name, value in row.items() if name.startswith("eval_")}
    results = {name: value for name, value in figures.items() if is_result(name, value)}
    evaluated = {"dataset_type": dataset or "text", "dataset_name": data.described(), "dataset_split": "validation"}
    meta = ModelCardData(
        model_name=title,
        library_name="peft" if isinstance(trainer.plain_model, PeftModel) else "transformers",
        pipeline_tag=task,
        base_model=base_model if on_hub else None,
        datasets=[dataset] if dataset else None,
        license=_license(base_model),
        tags=["gaudi-lm", "generated_from_trainer"],
        eval_results=[
            EvalResult(task, metric_type=name.removeprefix("eval_"), metric_value=value, **evaluated)
            for name, value in results.items()
            if math.isfinite(value)
        ],
    )
    rows: list[tuple[str, object]] = [("optimizer steps", f"{state.global_step} ({state.epoch or 0:.3g} epochs)")]
    if args.load_best_model_at_end and state.best_model_checkpoint:
        rows.append(("this model, the best by " + args.metric_for_best_model, f"step {state.best_global_step}"))
    rows += [(name.replace("_", " "), f"{value:.4f}") for name, value in results.items()]
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    settings = [(name, getattr(args, name)) for name in (length, *SHOWN)]
    versions = [("torch", torch), ("transformers", transformers), ("datasets", datasets)]
    command = command_line()
    fence = max(["``", *re.findall("`+", command)], key=len) + "`"  # a prompt may have one of its own
    origin = f"Fine-tuned from `{base_model}`" if base_model else "Trained from scratch"
    lines = [
        f"---\n{meta.to_yaml()}\n---",
        f"\n# {title}\n",
        f"{origin} on {data.described()} with gaudi-lm ({'Gaudi' if args.use_habana else 'CPU'}).\n",
        "## Command\n",
        f"{fence}bash\n{command}\n{fence}\n",
        "## Results\n",
        "| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "\n![loss curve](loss_curve.png)\n" if curve else "",
        "## Samples\n" if samples else "",
        *(f"{indent(prompt, CODE, bool)}\n\ngives\n\n{indent(answer, CODE, bool)}\n" for prompt, answer in samples),
        "## Settings\n",
        "| | |\n|---|---|",
        *(f"| {name} | {getattr(value, 'value', value)} |" for name, value in settings),
        f"\nPython {platform.python_version()}, "
        + ", ".join(f"{name} {module.__version__}" for name, module in versions)
        + ".\n",
    ]
    ModelCard("\n".join(lines), ignore_metadata_errors=True).save(path)


def _license(base_model: str | None) -> str | None:
    """The licence in the card of the model that was fine-tuned, where there is one that can be read now."""
    with contextlib.suppress(Exception):  # there is none, or the hub cannot be reached: the model is what counts
        folder = Path(base_model or "")
        card = folder / "README.md" if folder.is_dir() else base_model
        return ModelCard.load(card, ignore_metadata_errors=True).data.license if base_model else None
    return None

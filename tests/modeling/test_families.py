"""Each architecture family, tiny, on a simulated card: train, evaluate, resume.

The table in docs/models.md is what this finds.

python tests/modeling/test_families.py        writes the table into docs/models.md
"""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from running import End, run_several

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"(?<=<!-- families: begin -->\n).*?(?=<!-- families: end -->)", re.DOTALL)
FAMILIES = {
    "run_clm": {
        "GPT-2": "gpt2",
        "GPT-J": "gptj",
        "GPT-NeoX": "gpt_neox",
        "OPT": "opt",
        "BLOOM": "bloom",
        "Llama": "llama",
        "Mistral": "mistral",
        "Qwen2": "qwen2",
        "Gemma": "gemma",
        "Falcon": "falcon",
        "GPT-BigCode": "gpt_bigcode",
    },
    "run_mlm": {
        "BERT": "bert",
        "RoBERTa": "roberta",
        "DistilBERT": "distilbert",
        "ALBERT": "albert",
        "XLM-R": "xlm-roberta",
        "DeBERTa": "deberta",
        "DeBERTa v2, v3": "deberta-v2",
        "ModernBERT": "modernbert",
        "ELECTRA": "electra",
    },
}
STEPS, HALF = 8, 4


def write_inputs(folder: Path) -> None:
    """Text files, a tokenizer for each script, and a tiny configuration of each family.

    The vocabulary is left at the family's own: the scripts fit it to the tokenizer.
    """
    from pydoc_data.topics import topics

    from hub.stand_ins import masked_tokenizer, train_byte_level
    from tiny_models import CAUSAL, MASKED
    from transformers import AutoConfig, GPT2TokenizerFast

    texts = list(topics.values())
    (folder / "train.txt").write_text("\n".join(texts[:6]))
    (folder / "validation.txt").write_text(texts[6])
    GPT2TokenizerFast(tokenizer_object=train_byte_level(["<|endoftext|>"])).save_pretrained(folder / "run_clm")
    masked_tokenizer().save_pretrained(folder / "run_mlm")
    for families in FAMILIES.values():
        for model_type in families.values():
            settings = CAUSAL.get(model_type) or MASKED[model_type]
            AutoConfig.for_model(model_type, **settings).save_pretrained(folder / model_type)


def flags(script: str, model_type: str, folder: Path, output_dir: Path) -> list[str]:
    length = "--block_size" if script == "run_clm" else "--max_seq_length"
    return [
        *("--config_name", str(folder / model_type), "--tokenizer_name", str(folder / script)),
        *("--train_file", str(folder / "train.txt"), "--validation_file", str(folder / "validation.txt")),
        *("--do_train", "--do_eval", "--output_dir", str(output_dir), length, "64", "--max_eval_samples", "8"),
        *("--max_steps", str(STEPS), "--save_steps", str(HALF), "--logging_steps", "1", "--learning_rate", "3e-3"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"),
        *("--use_habana", "--use_lazy_mode", "--use_hpu_graphs_for_inference", "--throughput_warmup_steps", "2"),
    ]


def reason(end: End) -> str:
    """The last line of a failed run's log."""
    return end.log.strip().splitlines()[-1].replace("|", "/")[:200]


def losses(output_dir: Path) -> list[float]:
    """The training loss of each step."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def rows(script: str, folder: Path) -> list[str]:
    """The table's rows for one script, from two runs of each family: without a break, and on from its half."""
    environment = os.environ | {"GAUDI_SIMULATOR": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    families = FAMILIES[script]
    places = {
        model_type: (folder / "whole" / model_type, folder / "half" / model_type) for model_type in families.values()
    }
    wholes = run_several(script, [flags(script, t, folder, whole) for t, (whole, _) in places.items()], environment)
    for whole, half in places.values():
        if (whole / f"checkpoint-{HALF}").is_dir():
            shutil.copytree(whole / f"checkpoint-{HALF}", half / f"checkpoint-{HALF}")
    halves = run_several(script, [flags(script, t, folder, half) for t, (_, half) in places.items()], environment)
    table = []
    for (name, model_type), whole_end, half_end in zip(families.items(), wholes, halves, strict=True):
        whole, half = places[model_type]
        table.append(f"| {name} | `{model_type}` | `{script}.py` | {verdict(whole, half, whole_end, half_end)} |")
    return table


def verdict(whole: Path, half: Path, whole_end: End, half_end: End) -> str:
    """The table's columns for training, evaluation and resuming."""
    if whole_end.status:
        return f"failed: {reason(whole_end)} | not reached | not reached"
    history = losses(whole)
    trained = "yes" if sum(history[-2:]) < sum(history[:2]) else "failed: the loss did not fall"
    evaluated = "yes" if 1 < whole_end.metrics.get("eval_perplexity", 0) < float("inf") else "failed: no perplexity"
    if half_end.status:
        return f"{trained} | {evaluated} | failed: {reason(half_end)}"
    same_weights = (whole / "model.safetensors").read_bytes() == (half / "model.safetensors").read_bytes()
    same_losses = history == losses(half) and whole_end.metrics["eval_loss"] == half_end.metrics["eval_loss"]
    went_on = f"checkpoint-{HALF}" in half_end.log
    return (
        f"{trained} | {evaluated} | {'yes' if same_weights and same_losses and went_on else 'failed: other weights'}"
    )


HEADER = (
    "| family | model type | script | trains | evaluates | resumes to the same weights |\n|---|---|---|---|---|---|\n"
)


def make_rows(script: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        return rows(script, Path(folder))


@pytest.mark.slow
@pytest.mark.parametrize("script", FAMILIES)
def test_the_table_shows_what_was_found(script: str):
    shown = TABLE.search(PAGE.read_text())[0]
    assert shown.startswith(HEADER)
    assert [row for row in shown.splitlines() if f"`{script}.py`" in row] == make_rows(script)


def write_table() -> None:
    table = HEADER + "".join(f"{row}\n" for script in FAMILIES for row in make_rows(script))
    PAGE.write_text(TABLE.sub(lambda _: table, PAGE.read_text()))
    print(table)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    write_table()

"""Each architecture family, tiny, on a simulated card: train, evaluate, resume, adapt, pack, plan.

The table in docs/models.md is what this finds.

PYTHONPATH=tests:tests/support python tests/modeling/test_families.py        writes the table into docs/models.md
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN_TO_PEFT
from running import End, environment, losses, run_repeatedly
from simulator.cards import card_environment
from tiny_models import CAUSAL, MASKED, OTHERS

from gaudi_lm.architectures import ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"(?<=<!-- families: begin -->\n).*?(?=<!-- families: end -->)", re.DOTALL)
CAUSAL_FAMILIES = {
    "GPT-2": "gpt2",
    "GPT-J": "gptj",
    "GPT-Neo": "gpt_neo",
    "GPT-NeoX, Pythia": "gpt_neox",
    "GPT-BigCode": "gpt_bigcode",
    "gpt-oss": "gpt_oss",
    "OPT": "opt",
    "BLOOM": "bloom",
    "MPT": "mpt",
    "CodeGen": "codegen",
    "Falcon": "falcon",
    "Llama": "llama",
    "Mistral": "mistral",
    "Mixtral": "mixtral",
    "Qwen2": "qwen2",
    "Qwen2-MoE": "qwen2_moe",
    "Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3_moe",
    "Gemma": "gemma",
    "Gemma 2": "gemma2",
    "Gemma 3 (text)": "gemma3_text",
    "Phi-1, Phi-2": "phi",
    "Phi-3, Phi-4": "phi3",
    "Granite": "granite",
    "Granite-MoE": "granitemoe",
    "OLMo": "olmo",
    "OLMo 2": "olmo2",
    "OLMoE": "olmoe",
    "SmolLM3": "smollm3",
    "StableLM": "stablelm",
    "StarCoder2": "starcoder2",
    "Command R": "cohere",
    "Command R7B": "cohere2",
    "Persimmon": "persimmon",
}
MASKED_FAMILIES = {
    "BERT": "bert",
    "RoBERTa": "roberta",
    "DistilBERT": "distilbert",
    "ALBERT": "albert",
    "XLM-R": "xlm-roberta",
    "XLM-R XL": "xlm-roberta-xl",
    "CamemBERT": "camembert",
    "RoBERTa-PreLayerNorm": "roberta-prelayernorm",
    "DeBERTa": "deberta",
    "DeBERTa v2, v3": "deberta-v2",
    "ModernBERT": "modernbert",
    "ELECTRA": "electra",
    "MPNet": "mpnet",
    "Data2Vec (text)": "data2vec-text",
    "ESM": "esm",
    "I-BERT": "ibert",
    "Longformer": "longformer",
    "LUKE": "luke",
    "X-MOD": "xmod",
}
FAMILIES = {"run_clm": CAUSAL_FAMILIES, "run_lora_clm": CAUSAL_FAMILIES, "run_mlm": MASKED_FAMILIES}
TARGETS = {"persimmon": "query_key_value", "phi3": "qkv_proj"}
PARTS = [(script, part) for script in FAMILIES for part in range(5)]
STEPS, HALF = 4, 2
NOT_PACKED = "is not known to keep packed texts apart"
HEADER = (
    "| family | model type | script | trains | evaluates | resumes to the same weights | `--pack_sequences` | "
    "`--dry_run` |\n|---|---|---|---|---|---|---|---|\n"
)


def part_of(script: str, part: int) -> dict[str, str]:
    return dict(list(FAMILIES[script].items())[part::5])


def write_inputs(folder: Path, script: str, families: dict[str, str]) -> None:
    """Texts or instructions, a tokenizer, and a tiny configuration of each family; for LoRA with weights.

    The vocabulary is left at the family's own: the scripts fit it to the tokenizer.
    """
    from pydoc_data.topics import topics

    from hub.stand_ins import masked_tokenizer, paragraphs, train_byte_level
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2TokenizerFast

    if script == "run_lora_clm":
        lines = [json.dumps({"text": block[:90]}) for _, blocks in paragraphs() for block in blocks][:80]
        (folder / "train.jsonl").write_text("\n".join(lines[:64]))
        (folder / "validation.jsonl").write_text("\n".join(lines[64:]))
    else:
        texts = list(topics.values())
        (folder / "train.txt").write_text("\n".join(texts[:2]))
        (folder / "validation.txt").write_text(texts[6])
    if script == "run_mlm":
        tokenizer = masked_tokenizer()
    else:
        tokenizer = GPT2TokenizerFast(tokenizer_object=train_byte_level(["<|endoftext|>"]))
    for model_type in families.values():
        settings = CAUSAL.get(model_type) or MASKED.get(model_type) or OTHERS[model_type]
        tokenizer.save_pretrained(folder / model_type)
        if script == "run_lora_clm":
            ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
            config = AutoConfig.for_model(model_type, **settings, **ids, vocab_size=len(tokenizer))
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / model_type)
        else:
            AutoConfig.for_model(model_type, **settings).save_pretrained(folder / model_type)


def targets(model_type: str) -> list[str]:
    """The flag for a family of which peft has no layers by default."""
    known = model_type in KNOWN_TO_PEFT
    return [] if known else ["--lora_target_modules", *TARGETS.get(model_type, "q_proj v_proj").split()]


def flags(script: str, model_type: str, folder: Path, packed: bool) -> list[str]:
    model = str(folder / model_type)
    ending = "jsonl" if script == "run_lora_clm" else "txt"
    chosen = [
        *("--train_file", str(folder / f"train.{ending}"), "--validation_file", str(folder / f"validation.{ending}")),
        *("--do_train", "--block_size" if script == "run_clm" else "--max_seq_length", "64"),
        *("--max_steps", str(STEPS), "--save_steps", str(HALF), "--logging_steps", "1"),
        *("--learning_rate", "3e-2" if script == "run_lora_clm" else "1e-2"),
        *("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4"),
        *("--use_habana", "--use_lazy_mode", "--use_hpu_graphs_for_inference", "--throughput_warmup_steps", "1"),
    ]
    if script == "run_lora_clm":  # the same rows in each step, since few of the weights can learn
        chosen += ["--max_train_samples", "4", "--model_name_or_path", model, *targets(model_type)]
    else:
        chosen += ["--config_name", model, "--tokenizer_name", model]
    if packed:
        chosen += ["--pack_sequences"] + ["--line_by_line"] * (script == "run_mlm")
    return chosen


def last_line(text: str) -> str:
    """Of what a failed run has logged or printed."""
    return text.strip().splitlines()[-1].replace("|", "/")[:200]


def rows(script: str, families: dict[str, str], folder: Path) -> list[str]:
    """The table's rows: of a whole run of each family, packed where it can be, one on from its half, and a plan."""
    environ = environment(**card_environment())
    places = {t: (folder / "whole" / t, folder / "half" / t) for t in families.values()}

    def run(models: Iterable[str], packed: bool, half: bool, *more: str) -> dict[str, End]:
        runs = [
            [*flags(script, t, folder, packed and t not in refused), "--output_dir", str(places[t][half]), *more]
            for t in models
        ]
        return dict(zip(models, run_repeatedly(script, runs, environ, folder), strict=True)) if runs else {}

    refused: list[str] = []
    evaluation = ("--do_eval", "--max_eval_samples", "8")
    packable = script != "run_clm"
    wholes = run(places, packable, False, *evaluation)
    refused = [t for t, end in wholes.items() if end.status == 2 and NOT_PACKED in end.log]
    wholes |= run(refused, packable, False, *evaluation)
    for whole, half in places.values():
        if (whole / f"checkpoint-{HALF}").is_dir():
            shutil.copytree(whole / f"checkpoint-{HALF}", half / f"checkpoint-{HALF}")
    halves = run(places, packable, True)
    plans = run(() if script == "run_mlm" else places, packable, False, "--dry_run")
    table = []
    for name, model_type in families.items():
        command = " ".join([f"{script}.py", *(targets(model_type) if script == "run_lora_clm" else ())])
        found = verdict(*places[model_type], wholes[model_type], halves[model_type])
        packs = "-" if not packable else "no" if model_type in refused else "yes"
        plan = plans[model_type].printed if model_type in plans else None
        planned = "-" if plan is None else "yes" if "it fits" in plan else f"failed: {last_line(plan)}"
        table.append(f"| {name} | `{model_type}` | `{command}` | {found} | {packs} | {planned} |")
    return table


def verdict(whole: Path, half: Path, whole_end: End, half_end: End) -> str:
    """The table's columns for training, evaluation and resuming."""
    if whole_end.status:
        return f"failed: {last_line(whole_end.log)} | not reached | not reached"
    history = losses(whole)
    trained = "yes" if sum(history[-2:]) < sum(history[:2]) else "failed: the loss did not fall"
    evaluated = "yes" if 1 < whole_end.metrics.get("eval_perplexity", 0) < float("inf") else "failed: no perplexity"
    if half_end.status:
        return f"{trained} | {evaluated} | failed: {last_line(half_end.log)}"
    (weights,) = [path.name for path in whole.glob("*model.safetensors")]
    same_weights = (whole / weights).read_bytes() == (half / weights).read_bytes()
    went_on = f"checkpoint-{HALF}" in half_end.log
    resumed = "yes" if same_weights and history == losses(half) and went_on else "failed: other weights"
    return f"{trained} | {evaluated} | {resumed}"


def make_rows(script: str, families: dict[str, str]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), script, families)
        return rows(script, families, Path(folder))


def test_every_architecture_is_a_family():
    assert sorted([*CAUSAL_FAMILIES.values(), *MASKED_FAMILIES.values()]) == sorted(ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize("script, part", PARTS)
def test_the_table_shows_what_was_found(script: str, part: int):
    shown = TABLE.search(PAGE.read_text())[0]
    assert shown.startswith(HEADER)
    table = [row for row in shown.splitlines() if f"`{script}.py" in row]
    assert len(table) == len(FAMILIES[script])
    assert table[part::5] == make_rows(script, part_of(script, part))


def write_table() -> None:
    table = HEADER + "".join(
        f"{row}\n" for script, families in FAMILIES.items() for row in make_rows(script, families)
    )
    PAGE.write_text(TABLE.sub(lambda _: table, PAGE.read_text()))
    print(table)


if __name__ == "__main__":
    write_table()

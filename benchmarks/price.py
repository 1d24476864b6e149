"""What a training step takes on simulated cards, in counts: this suite against a plain GaudiTrainer.

Bytes, operations, graphs and waits are the same on every machine; nothing here is timed.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaTokenizerFast,
)

from demo.lora import pairs

from .measure import write_report
from .tables import price_table
from .workloads import paragraphs

ROOT = Path(__file__).parent.parent
SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
SIZES = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6, **SPECIAL}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "intermediate_size": 1536}
MODELS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_layer=6, n_embd=384, n_head=6, **SPECIAL)),
    "roberta": (RobertaForMaskedLM, RobertaConfig(**ROBERTA, **SIZES)),
    "llama": (LlamaForCausalLM, LlamaConfig(vocab_size=32000, intermediate_size=1024, **SIZES)),
}
COMMON = "--do_train --use_habana --use_lazy_mode --throughput_warmup_steps 3 --logging_steps 100000 --report_to none"
GAUDI = "--gaudi_config_name Habana/gpt2"  # the same for RoBERTa
FUSED = "--attn_implementation gaudi_fused_sdpa"  # there is none for a plain GaudiTrainer's RoBERTa
LORA = "--bf16 True --gradient_accumulation_steps 4 --learning_rate 1e-4"
# On two cards rows are short: what is sent does not depend on them.
TWO = "--per_device_train_batch_size 1"


@dataclass(frozen=True)
class Workload:
    """A run of this suite and that of a plain GaudiTrainer which it is compared with, on the same cards.

    Args:
        ours, upstream: script and flags of this suite, and what follows `benchmarks/upstream.py`.
        flags: of both.
        goals: by figure, the most that the ratio may be.
    """

    what: str
    model: str
    data: str
    ours: str
    upstream: str
    flags: str
    goals: dict[str, float] = field(default_factory=dict)
    cards: int = 1
    steps: int = 5

    def command(self, side: str, folder: Path, output: Path, counts: Path) -> list[str]:
        """The run of ``ours`` or ``upstream``, on what `write_inputs` has written into ``folder``.

        A checkpoint is saved after the last step.
        """
        script, *own = shlex.split(self.ours if side == "ours" else f"benchmarks/upstream.py {self.upstream}")
        names = ("--model_name_or_path", "--train_file") if side == "ours" else ("--model", "--data")
        inputs = [names[0], str(folder / self.model), names[1], str(folder / self.data)]
        saving = ["--max_steps", str(self.steps), "--save_steps", str(self.steps), "--output_dir", str(output)]
        flags = [*own, *inputs, *shlex.split(f"{COMMON} {self.flags}"), *saving]
        return ["benchmarks/counting.py", str(counts), script, *flags]


WORKLOADS = {
    "clm": Workload(
        "GPT-2, blocks of 512 tokens, 4 a step",
        "gpt2",
        "text.txt",
        f"run_clm.py --block_size 512 {GAUDI}",
        "clm --length 512",
        "--per_device_train_batch_size 4",
        {"peak_memory_bytes": 0.5, "flop_per_token": 1.0},
    ),
    "mlm_padded": Workload(
        "RoBERTa, lines padded to 512 tokens, 8 a step",
        "roberta",
        "text.txt",
        f"run_mlm.py --line_by_line --pad_to_max_length {GAUDI} {FUSED}",
        "mlm --length 512",
        "--per_device_train_batch_size 8",
        {"peak_memory_bytes": 0.4},
    ),
    "mlm_packed": Workload(
        "RoBERTa, lines packed into rows of 512 tokens",
        "roberta",
        "text.txt",
        f"run_mlm.py --line_by_line --pack_sequences {GAUDI} {FUSED}",
        "mlm --length 512",
        "--per_device_train_batch_size 8",
        {"peak_memory_bytes": 0.4, "flop_per_token": 0.08},
    ),
    "lora_padded": Workload(
        "LoRA on a Llama, padded to one of four lengths, 4 times 2 a step",
        "llama",
        "pairs.jsonl",
        "run_lora_clm.py",
        "lora --length 512",
        f"{LORA} --per_device_train_batch_size 2",
        {"peak_memory_bytes": 0.25},
    ),
    "lora_packed": Workload(
        "LoRA on a Llama, packed into rows of 512 tokens",
        "llama",
        "pairs.jsonl",
        "run_lora_clm.py --pack_sequences",
        "lora --length 512",
        f"{LORA} --per_device_train_batch_size 2",
        {"flop_per_token": 0.35},
    ),
    "clm_2_cards": Workload(
        "GPT-2 on 2 cards",
        "gpt2",
        "text.txt",
        f"run_clm.py --block_size 64 {GAUDI}",
        "clm --length 64",
        TWO,
        cards=2,
    ),
    "mlm_2_cards": Workload(
        "RoBERTa on 2 cards",
        "roberta",
        "text.txt",
        f"run_mlm.py --line_by_line --pad_to_max_length --max_seq_length 64 {GAUDI}",
        "mlm --length 64",
        TWO,
        cards=2,
    ),
    "lora_2_cards": Workload(
        "LoRA on a Llama on 2 cards",
        "llama",
        "pairs.jsonl",
        "run_lora_clm.py --pack_sequences --max_seq_length 64",
        "lora --length 64",
        f"{LORA} {TWO}",
        cards=2,
    ),
    "clm_zero_2": Workload(
        "GPT-2 on 2 cards, `configs/deepspeed/zero_2.json`",
        "gpt2",
        "text.txt",
        f"run_clm.py --block_size 64 {GAUDI} --deepspeed configs/deepspeed/zero_2.json",
        "clm --length 64 --deepspeed configs/deepspeed/zero_2.json",
        TWO,
        cards=2,
    ),
    "clm_zero_2_reduce": Workload(
        "the same with `zero_2_reduce.json` here",
        "gpt2",
        "text.txt",
        f"run_clm.py --block_size 64 {GAUDI} --deepspeed configs/deepspeed/zero_2_reduce.json",
        "clm --length 64 --deepspeed configs/deepspeed/zero_2.json",
        TWO,
        cards=2,
    ),
}
# What two cards are asked for; the rest is asked of one.
OF_TWO = ("sent_bytes_per_step",)
OF_ONE = ("peak_memory_bytes", "flop_per_token", "graphs", "graphs_after_warmup", "host_waits_per_step")
OF_ONE += ("checkpoint_bytes",)
NONE_OF = ("graphs_after_warmup", "host_waits_per_step")


def write_inputs(folder: Path) -> None:
    """Models with random weights and vocabularies as on the hub, their tokenizer, a text, and instructions."""
    parts = paragraphs()
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(parts, vocab_size=8000, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    for name, (model_class, config) in MODELS.items():
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder / name)
        if name == "roberta":  # with <s> and </s> around each text
            tokenizer = RobertaTokenizerFast(tokenizer_object=trained._tokenizer, trim_offsets=True)
            tokenizer._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
        else:
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
            )
        tokenizer.save_pretrained(folder / name)
    # About 100 tokens a line, as in WikiText.
    lines = [" ".join(parts[start : start + 3]) for start in range(0, len(parts), 3)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs())) + "\n")


def environment(workload: Workload) -> dict[str, str]:
    """Variables of a run: nothing is multiplied, as counts do not depend on values; memory is kept, for speed."""
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
    return {"GAUDI_SIMULATOR": str(workload.cards), "GAUDI_SIMULATOR_PRODUCTS": "0", "HF_HUB_OFFLINE": "1", **kept}


def figures_of(workload: Workload, counts: Path, output: Path) -> dict[str, float]:
    """What a run that has ended is held against."""
    found = json.loads(counts.read_text())
    files = output.glob("checkpoint-*/**/*")
    found["checkpoint_bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    return {name: found[name] for name in (OF_ONE if workload.cards == 1 else OF_TWO)}


def count(workload: Workload, side: str, folder: Path) -> dict[str, float]:
    """Run one side of a workload; its counts."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        output, counts = Path(name, "output"), Path(name, "counts")
        command = [sys.executable]
        if workload.cards > 1:
            command += ["gaudi_spawn.py", "--world_size", str(workload.cards), "--env", "GAUDI_SIMULATOR_PRODUCTS"]
        command += workload.command(side, folder, output, counts)
        inherited = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "PT_HPU_LAZY_MODE")}
        done = subprocess.run(
            command, cwd=ROOT, env=inherited | environment(workload), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}")
        return figures_of(workload, counts, output)


def least_zero_2_bytes() -> float:
    """What each of two ranks sends in a step of ZeRO-2 at least: gradients to owners, weights from them, in bf16."""
    model_class, config = MODELS["gpt2"]
    with torch.device("meta"):
        weights = sum(p.numel() for p in model_class(config).parameters())
    return 2 * 2 * weights / 2


def compare(workload: Workload, ours: dict[str, float], upstream: dict[str, float], least: float) -> dict[str, dict]:
    """By figure: both sides, the goal in words, and whether it is met (None where there is no goal)."""
    found = {}
    for name, value in ours.items():
        goal, met = "", None
        if name in workload.goals:
            most = workload.goals[name]
            goal, met = f"<= {most}", value / upstream[name] <= most
        elif name in NONE_OF:
            goal, met = "0", value == 0
        elif "--deepspeed" in workload.ours:
            # Norms and losses are sent besides, a number each.
            goal, met = f"<= {least / 1e6:.1f} MB, ZeRO-2's least", value <= least + 1000
        found[name] = {"ours": value, "upstream": upstream[name], "goal": goal, "met": met}
    return found


def price() -> None:
    """Run all; writes benchmarks/results/price.json."""
    least, figures = least_zero_2_bytes(), {}
    with tempfile.TemporaryDirectory() as name:
        folder, theirs = Path(name), {}
        write_inputs(folder)
        for key, workload in WORKLOADS.items():
            same = (workload.upstream, workload.flags, workload.steps)
            if same not in theirs:
                theirs[same] = count(workload, "upstream", folder)
            ours = count(workload, "ours", folder)
            figures[key] = {"what": workload.what, **compare(workload, ours, theirs[same], least)}
            print(key, figures[key], flush=True)
    write(figures)


def write(figures: dict[str, dict]) -> None:
    """Write the result, and print it as a table."""
    goals = [row["met"] for one in figures.values() for row in one.values() if isinstance(row, dict)]
    goals = [met for met in goals if met is not None]
    write_report("price", sum(goals) / len(goals), "all goals", all(goals), figures)
    print(price_table(figures))

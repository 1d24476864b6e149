"""The tables of results in docs/benchmarks.md and README.md, made from benchmarks/results/."""

import json
import re
from pathlib import Path

from .measure import RESULTS

ROOT = Path(__file__).parent.parent
# Benchmark: what it is, what it is compared with, and the figures of the memory that a step of each adds.
GAINS = {
    "clm_step": (
        "GPT-2, a step of `run_clm.py`",
        "a hand-written loop with SDPA and fused AdamW",
        ("ours_added_memory_mib", "loop_added_memory_mib"),
    ),
    "mlm_packed": (
        "RoBERTa-base, `--line_by_line --pack_sequences`",
        "lines padded to 512 tokens, full head",
        ("packed_added_memory_mib", "padded_added_memory_mib"),
    ),
    "mlm_head": (
        "RoBERTa-base, head on masked tokens only",
        "head on all tokens",
        ("masked_head_added_memory_mib", "full_head_added_memory_mib"),
    ),
    "lora_packed": (
        "LoRA, `--pack_sequences`",
        "examples padded to 512 tokens, full loss",
        ("packed_added_memory_mib", "padded_added_memory_mib"),
    ),
}


def read_result(name: str) -> dict | None:
    """The committed result of a benchmark, or None where it was never run."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def results_table(names: list[str]) -> str:
    """The results of these benchmarks as a Markdown table, without those that were never run."""
    lines = ["| benchmark | ratio | target | met | measured on |", "|---|---|---|---|---|"]
    for name in names:
        if result := read_result(name):
            host = result["machine"]
            machine = f"{host['cores']} cores {host['processor']}, {host['vector_unit']}, load {host['load_at_start']}"
            met = "yes" if result["met"] else "no"
            lines.append(
                f"| `{name}` | {result['ratio']:.3g} | {result['target']} | {met} | {machine}, {host['date']} |"
            )
    return "\n".join(lines) + "\n"


def gains_table() -> str:
    """What a user gains in a training step, as a Markdown table."""
    lines = ["| what | compared with | tokens per second | memory that a step adds |", "|---|---|---|---|"]
    for name, (what, baseline, (ours, theirs)) in GAINS.items():
        if result := read_result(name):
            memory = result["figures"][ours] / result["figures"][theirs]
            lines.append(f"| {what} | {baseline} | {result['ratio']:.1f} times | {memory:.2f} times |")
    return "\n".join(lines) + "\n"


PRICES = {
    "peak_memory_bytes": "peak memory of a card, MB",
    "flop_per_token": "MFLOP for each token that is not padding",
    "graphs": "graphs compiled",
    "graphs_after_warmup": "graphs compiled after warm-up",
    "host_waits_per_step": "waits of the host in a step",
    "checkpoint_bytes": "a checkpoint, MB",
    "sent_bytes_per_step": "sent by a card in a step, MB",
}


def price_table(figures: dict[str, dict]) -> str:
    """What steps of this suite and of a plain GaudiTrainer take, as a Markdown table.

    Args:
        figures: of benchmarks/results/price.json.
    """
    lines = ["| run | what | this suite | GaudiTrainer | ratio | goal | met |", "|---|---|---|---|---|---|---|"]
    for run in figures.values():
        for name, words in PRICES.items():
            if name not in run:
                continue
            row, scale = run[name], 1e6 if name.endswith("_bytes") or "MB" in words or "MFLOP" in words else 1
            ours, theirs = row["ours"], row["upstream"]
            ratio = f"{ours / theirs:.3f}" if theirs else ""
            met = {True: "yes", False: "no", None: ""}[row["met"]]
            shown = (f"{value / scale:.1f}" if scale > 1 else f"{value:g}" for value in (ours, theirs))
            lines.append(f"| {run['what']} | {words} | {' | '.join(shown)} | {ratio} | {row['goal']} | {met} |")
    return "\n".join(lines) + "\n"


def short_price_table(figures: dict[str, dict]) -> str:
    """The memory and the operations of one card, against those of a plain GaudiTrainer."""
    lines = ["| on one simulated card | peak memory | FLOP for a token |", "|---|---|---|"]
    for run in figures.values():
        if "flop_per_token" in run:
            memory, flop = (
                run[name]["ours"] / run[name]["upstream"] for name in ("peak_memory_bytes", "flop_per_token")
            )
            lines.append(f"| {run['what']} | {memory:.2f} times | {flop:.2f} times |")
    return "\n".join(lines) + "\n"


def write_between(page: Path, mark: str, table: str) -> None:
    """Put a table between the comments ``<!-- MARK: begin -->`` and ``<!-- MARK: end -->`` of a page."""
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    pattern = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
    page.write_text(pattern.sub(lambda _: table, page.read_text()))


def write_tables(names: list[str]) -> None:
    """Write all tables into their pages.

    Args:
        names: the benchmarks of the table in docs/benchmarks.md, in its order.
    """
    write_between(ROOT / "docs" / "benchmarks.md", "benchmarks", results_table(names))
    write_between(ROOT / "README.md", "gains", gains_table())
    if price := read_result("price"):
        write_between(ROOT / "docs" / "benchmarks.md", "price", price_table(price["figures"]))
        write_between(ROOT / "README.md", "price", short_price_table(price["figures"]))

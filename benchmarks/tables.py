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


def write_between(page: Path, mark: str, table: str) -> None:
    """Put a table between the comments ``<!-- MARK: begin -->`` and ``<!-- MARK: end -->`` of a page."""
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    pattern = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
    page.write_text(pattern.sub(lambda _: table, page.read_text()))


def write_tables(names: list[str]) -> None:
    """Write both tables into their pages.

    Args:
        names: the benchmarks of the table in docs/benchmarks.md, in its order.
    """
    write_between(ROOT / "docs" / "benchmarks.md", "benchmarks", results_table(names))
    write_between(ROOT / "README.md", "gains", gains_table())

"""Figures of the card for the end of a run: graphs compiled, waits of the host, memory.

A graph that is compiled anew in the middle of training, because a shape changed, is the most frequent cause of slow
runs on Gaudi. A simulated card names the operation that caused it; a real one counts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import TrainerCallback

LEAST_WARMUP_STEPS = 3
"""Warm-up where none is asked for: the first steps differ, because gradients and optimizer state do not exist yet."""

NAMED_RECOMPILATIONS = 3
DEVICE_FIGURES = (
    "graph_compilations", "graph_compilations_after_warmup", "host_syncs_per_step", "peak_device_memory_gb",
)  # fmt: skip


class DeviceMetrics(TrainerCallback):
    """Watches a run; add it to the trainer's callbacks, and read it when the run is over.

    What happens between two events is attributed to the later one:

    - a *training step* ends with `on_step_end`, and begins with the fetching of its batch;
    - an *evaluation step* ends with `on_prediction_step`;
    - *housekeeping* ends with `on_log`, `on_save` or `on_evaluate`.

    Warm-up is the first `warmup_steps` training steps, the first `warmup_steps` evaluation steps, and the first
    housekeeping of each kind, a log line of other figures being another kind. The lazy graph is closed after
    housekeeping: without that, the arithmetic of a log line becomes part of the next step's graph, which is then
    compiled anew.
    """

    def __init__(self, warmup_steps: int):
        self.warmup_steps = warmup_steps or LEAST_WARMUP_STEPS
        self._compilations_after_warmup = 0
        self._recompilations: list[str] = []
        self._training_steps = self._evaluation_steps = 0
        self._counted_steps = self._counted_syncs = 0
        self._housekeeping: set[str] = set()
        self._has_card = hasattr(torch, "hpu") and torch.hpu.is_available()
        self._compilations = _counter("graph_compilation") if self._has_card else None
        self._syncs = _counter("host_sync") if self._has_card else None
        self._seen = self._total()

    def figures(self) -> dict[str, float]:
        """What the card can tell of

        - `graph_compilations`: graphs compiled by this process;
        - `graph_compilations_after_warmup`: those of them after warm-up, see above;
        - `host_syncs_per_step`: how often, in a training step after warm-up, the host waited for the card (`item`, a
          copy to the host, an operation whose result has a shape that depends on values, `synchronize`): mean over
          those steps without the first, where the clock is started; housekeeping, which waits to log, is not counted;
        - `peak_device_memory_gb`: in units of 2^30 bytes.

        Empty without a card.
        """
        if not self._has_card:
            return {}
        figures: dict[str, float] = {}
        if self._compilations:
            figures["graph_compilations"] = self._compilations()
            figures["graph_compilations_after_warmup"] = self._compilations_after_warmup
        if self._syncs and self._counted_steps:
            figures["host_syncs_per_step"] = round(self._counted_syncs / self._counted_steps, 3)
        figures["peak_device_memory_gb"] = round(torch.hpu.max_memory_allocated() / 2**30, 4)
        return figures

    def report_lines(self) -> list[str]:
        """For the log: where graphs were compiled after warm-up."""
        where = "; ".join(self._recompilations) or "PT_HPU_METRICS_FILE tells when"
        count = self._compilations_after_warmup
        return [f"{count} graphs were compiled after warm-up: {where}"] if count else []

    def on_step_end(self, args, state, control, **kwargs):
        self._training_steps += 1
        syncs = self._attribute(f"training step {state.global_step}", self._training_steps > self.warmup_steps)
        if self._training_steps > self.warmup_steps + 1:
            self._counted_steps += 1
            self._counted_syncs += syncs

    def on_prediction_step(self, args, state, control, **kwargs):
        self._evaluation_steps += 1
        self._attribute(f"evaluation step {self._evaluation_steps}", self._evaluation_steps > self.warmup_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._keep_house(f"log of {', '.join(sorted(logs or ()))}")

    def on_save(self, args, state, control, **kwargs):
        self._keep_house("save")

    def on_evaluate(self, args, state, control, **kwargs):
        self._keep_house("evaluate")

    def _keep_house(self, kind: str) -> None:
        if not self._has_card:
            return
        import habana_frameworks.torch.core as htcore

        htcore.mark_step()
        self._attribute(kind, kind in self._housekeeping)
        self._housekeeping.add(kind)

    def _total(self) -> tuple[int, int]:
        return (self._compilations() if self._compilations else 0, self._syncs() if self._syncs else 0)

    def _attribute(self, where: str, counts: bool) -> int:
        """Take what happened since the last event; the number of times that the host waited."""
        before, self._seen = self._seen, self._total()
        compiled, syncs = (now - then for now, then in zip(self._seen, before, strict=True))
        if counts and compiled:
            self._compilations_after_warmup += compiled
            for cause in _causes(before[0]):
                if len(self._recompilations) < NAMED_RECOMPILATIONS:
                    self._recompilations.append(f"{where}: {cause}")
        return syncs


def _counter(name: str) -> Callable[[], int] | None:
    """Reads a counter of the card; None where the card has no such counter."""
    try:
        from habana_frameworks.torch.hpu.metrics import metric_global

        metric = metric_global(name)
        int(dict(metric.stats())["TotalNumber"])
    except (ImportError, ValueError, KeyError, TypeError, RuntimeError, AttributeError):
        return None
    return lambda: int(dict(metric.stats())["TotalNumber"])


def _causes(since: int) -> list[str]:
    """The first new operation of each graph compiled since; a real card does not tell."""
    try:
        from habana_frameworks.torch.hpu.metrics import compilations
    except ImportError:
        return []
    return [
        f"{graph['first']}, operation {graph['position'] + 1} of {graph['operations']}"
        for graph in compilations(since)
    ]

"""What a run is judged by: token accuracy, perplexity, throughput, and the loss curve."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from gaudi_lm.training.agreement import gather

logger = logging.getLogger("gaudi_lm")


def token_metrics(loss_sum: list[float], correct: list[int], count: list[int]) -> dict[str, float]:
    """``loss``, ``perplexity`` and ``accuracy`` of a token model, every label alike; NaN where there is no label.

    Args:
        loss_sum: summed cross-entropy in nats, one entry for each part of an evaluation, such as a rank.
        correct: how often the most probable token was the label.
        count: how many labels there were.
    """
    total = sum(count)
    if not total:
        return {"loss": math.nan, "perplexity": math.nan, "accuracy": math.nan}
    loss = math.fsum(loss_sum) / total
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "accuracy": sum(correct) / total,
    }


class Throughput:
    """Samples, tokens and steps that were really executed, over the time that they took.

    The first ``warmup_steps`` optimizer steps, evaluation and saving are outside; waiting for data is inside. Padding
    is counted apart. All figures are of this rank.

    Args:
        warmup_steps: optimizer steps at the start of this process that do not count.
        synchronise: waits until the card has done its work; called at the end of warm-up and where the clock stops.
    """

    def __init__(self, warmup_steps: int, synchronise: Callable[[], None]):
        self.warmup_steps = warmup_steps
        self.synchronise = synchronise
        self.seconds = 0.0
        self.steps_seen = self.steps = self.samples = self.tokens = self.positions = 0
        self._started: float | None = None
        self._last = (0, 0, 0.0)  # tokens, positions and seconds at the last log line

    def begin_step(self) -> None:
        """Before the data of an optimizer step is fetched."""
        if self._started is None and self.steps_seen >= self.warmup_steps:
            self._started = time.perf_counter()

    def end_step(self, samples: int, tokens: int, positions: int) -> None:
        """After an optimizer step.

        Args:
            samples: rows, of which ``tokens`` are not padding and ``positions`` are all.
        """
        self.steps_seen += 1
        if self.steps_seen == self.warmup_steps:
            self.synchronise()
        if self._started is not None:
            self.steps += 1
            self.samples += samples
            self.tokens += tokens
            self.positions += positions

    def pause(self) -> None:
        """Before work that is not training; the next :meth:`begin_step` goes on."""
        if self._started is not None:
            self.synchronise()
            self.seconds += time.perf_counter() - self._started
            self._started = None

    def since_last(self) -> dict[str, float]:
        """Tokens a second of all ranks, and their share of padding, since the last call; nothing during warm-up.

        The clock runs on: call it where the host has just waited for the card. All ranks must call it.
        """
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        now = (self.tokens, self.positions, self.seconds + running)
        ranks = gather([new - old for new, old in zip(now, self._last, strict=True)])
        self._last = now
        tokens, positions, seconds = (list(column) for column in zip(*ranks, strict=True))
        if not sum(positions) or not max(seconds):
            return {}
        return {
            "tokens_per_second": round(sum(tokens) / max(seconds), 1),
            "padding_share": round(1 - sum(tokens) / sum(positions), 4),
        }

    def figures(self, prefix: str) -> dict[str, float]:
        """Samples, steps and tokens a second of all ranks together, and their share of padding.

        Args:
            prefix: of the names, such as ``train``.
        """
        self.pause()
        own = (self.samples, self.tokens, self.positions, self.seconds, self.steps)
        ranks = list(zip(*gather(own), strict=True))
        samples, tokens, positions = map(sum, ranks[:3])
        seconds, steps = max(ranks[3]), ranks[4][0]
        if not steps or not seconds:
            if self.steps_seen:
                logger.warning(
                    "Not reporting %s throughput: all %d steps were warm-up (--throughput_warmup_steps %d)",
                    prefix, self.steps_seen, self.warmup_steps,
                )  # fmt: skip
            return {}
        return {
            f"{prefix}_samples_per_second": round(samples / seconds, 3),
            f"{prefix}_steps_per_second": round(steps / seconds, 3),
            f"{prefix}_tokens_per_second": round(tokens / seconds, 1),
            f"{prefix}_padding_share": round(1 - tokens / positions, 4) if positions else 0.0,
        }


def save_loss_curve(history: list[dict], path: Path) -> bool:
    """Draw training and evaluation loss over optimizer steps as a PNG picture.

    Args:
        history: ``trainer.state.log_history``.
        path: where to write.

    Returns:
        Whether there was anything to draw.
    """
    train = [(row["step"], row["loss"]) for row in history if "loss" in row]
    evaluation = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    if not train and not evaluation:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for points, label, marker in ((train, "training", None), (evaluation, "evaluation", "o")):
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker or ("." if len(points) == 1 else None))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True

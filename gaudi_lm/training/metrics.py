"""What a run is judged by: token accuracy, perplexity, throughput, and the loss curve."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from gaudi_lm.training.agreement import gather

logger = logging.getLogger("gaudi_lm")

NO_RESULTS = ("_runtime", "_samples", "_tokens", "_per_second", "_share")  # of data and time


def token_metrics(loss_sum: list[float], correct: list[int], count: list[int]) -> dict[str, float]:
    """``loss``, ``perplexity`` and ``accuracy`` of a token model, every label alike; NaN where there is no label.

    Args:
        loss_sum: summed cross-entropy in nats, one entry for each part of an evaluation, such as a rank.
        correct: how often the most probable token was the label.
        count: how many labels there were.
    """
    total = sum(count)
    if not total:
        logger.warning(
            "the evaluation has no token to predict, so loss, perplexity and accuracy are NaN: give it more samples "
            "(--max_eval_samples), or a masked model a higher --mlm_probability"
        )
        return {"loss": math.nan, "perplexity": math.nan, "accuracy": math.nan}
    loss = math.fsum(loss_sum) / total
    return {
        "loss": loss,
        "perplexity": math.inf if loss > 700 else math.exp(loss),
        "accuracy": sum(correct) / total,
    }


def is_result(name: str, value: object) -> bool:
    """Whether a figure of an evaluation is about the model, and neither about the data nor about time."""
    return not name.endswith(NO_RESULTS) and isinstance(value, (int, float))


class Throughput:
    """Samples, tokens and steps that were really executed, over the time that they took.

    The first ``warmup_steps`` optimizer steps, evaluation and saving are outside; waiting for data is inside. Padding
    is counted apart. All figures are of this rank.

    Args:
        warmup_steps: optimizer steps at the start of this process that do not count.
        synchronise: waits until the card has done its work; called at the end of warm-up and where the clock stops.
        parts: ranks that share a sample.
    """

    def __init__(self, warmup_steps: int, synchronise: Callable[[], None], parts: int = 1):
        self.warmup_steps = warmup_steps
        self.synchronise = synchronise
        self.parts = parts
        self.seconds = 0.0
        self.steps_seen = self.steps = self.tokens = self.positions = 0
        self.samples = 0.0
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
            self.samples += samples / self.parts
            self.tokens += tokens
            self.positions += positions

    def pause(self) -> None:
        """Before work that is not training; the next :meth:`begin_step` goes on."""
        if self._started is not None:
            self.synchronise()
            self.seconds += time.perf_counter() - self._started
            self._started = None

    def since_last(self) -> dict[str, float]:
        """Tokens a second and padding of all ranks since the last call; the card must just have been waited for."""
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
    """Draw losses and learning rate over optimizer steps as a PNG picture.

    The training loss is a running median of its logged values; single peaks do not make the rest flat.

    Args:
        history: ``trainer.state.log_history``, of one evaluation set or several.
        path: where to write.

    Returns:
        Whether there was anything to draw.
    """
    found = pd.DataFrame(history)
    # Of several evaluation sets each has its name in its figures; a metric of one's own may be named a loss, too.
    sets = [name for name in found if name.startswith("eval_") and name.endswith("_loss")]
    sets = [name for name in sets if name == "eval_loss" or f"{name.removesuffix('loss')}samples" in found]
    table = found.reindex(columns=["step", "loss", "learning_rate", *sets]).set_index("step")
    table = table.astype(float).replace([math.inf, -math.inf], math.nan)
    loss, rate, *evaluations = (table[name].dropna() for name in table)
    # Of the last step the evaluation while training: the one after it may be of the best model.
    evaluations = [line[~line.index.duplicated()] for line in evaluations if not line.empty]
    if loss.empty and not evaluations:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.12, right=0.92, bottom=0.11, top=0.94)  # a layout engine draws all of it once more
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    smooth = loss.rolling(1 + len(loss) // 100 * 2 + 2 * (len(loss) > 20), center=True, min_periods=1).median()
    dense = len(loss) > 2000
    axes.plot(loss, ".", color="lightsteelblue", markersize=1 if dense else 5, alpha=0.3 if dense else 1)
    marker = "." if len(loss) == 1 else None
    lines = [] if loss.empty else axes.plot(smooth, color="C0", marker=marker, label="training")
    for number, line in enumerate(evaluations, 1):
        label = f"evaluation {line.name[len('eval_') : -len('_loss')]}".strip()
        lines += axes.plot(line, color=f"C{number}", marker="o" if len(line) <= 50 else ".", label=label)
    most = loss.quantile([0.002, 0.99], interpolation="lower")
    shown = pd.concat([most, smooth[len(smooth) // 50 :], *evaluations]).dropna()
    margin = 0.05 * (shown.max() - shown.min()) or 0.05
    axes.set_ylim(shown.min() - margin, shown.max() + margin)
    if len(steps := {*loss.index, *(step for line in evaluations for step in line.index)}) == 1:
        axes.set_xlim(min(steps) - 1, min(steps) + 1)  # ticks are of whole steps
    if not rate.empty:
        right = axes.twinx()
        lines += right.plot(rate, color="0.6", linestyle="--", linewidth=1, label="learning rate")
        right.set_ylim(0)
        right.set_ylabel("learning rate")
        right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.set_zorder(right.get_zorder() + 1)  # the losses lie on top
        axes.patch.set_visible(False)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(handles=lines)
    figure.savefig(path, dpi=120)
    return True

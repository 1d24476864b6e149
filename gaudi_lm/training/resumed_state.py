"""What a run brings along from its checkpoint, and what it means where something has changed since it was written."""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path

import datasets
import torch
from optimum.habana.transformers.trainer import GaudiTrainer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from gaudi_lm.arguments.context_parallel import data_ranks
from gaudi_lm.errors import UserError
from gaudi_lm.training import checkpoints
from gaudi_lm.training.agreement import gather
from gaudi_lm.training.digests import may_be_same
from gaudi_lm.training.progress import EarlyStopping, evaluations_without_better

logger = logging.getLogger("gaudi_lm")

# fmt: off
WITHOUT_EFFECT = {
    "cache_dir", "disable_tqdm", "do_eval", "do_predict", "do_train", "early_stopping_patience", "generate",
    "greater_is_better", "keep_in_memory", "show_examples",
    "load_best_model_at_end", "load_meta_device", "local_rank", "low_cpu_mem_usage", "merge_adapter",
    "metric_for_best_model", "output_dir", "overwrite_cache", "overwrite_output_dir", "prediction_loss_only",
    "preprocessing_num_workers", "report_to", "resume_from_checkpoint", "run_name", "skip_memory_metrics",
    "use_hpu_graphs_for_inference", "validation_file",
}
WITHOUT_EFFECT_BEGIN = (
    "bf16_full", "dataloader_num", "dataloader_pers", "dataloader_pin", "dataloader_pre", "dataset_cache", "ddp_",
    "disable_tensor_cache", "eval_", "fp16_full", "hub_", "include_", "log_", "logging_", "max_eval",
    "max_hpu_graphs", "per_device_eval", "profiling", "push_to_hub", "save_", "throughput",
)
# fmt: on
"""Flags, and beginnings of flags, that decide neither a weight nor the order of the data."""

ORDER = {"seed", "data_seed", "group_by_length", "dataloader_drop_last", "ignore_data_skip"}


def decisive_flags(training_args) -> dict:
    """The flags that decide weights or order of data, as JSON values, without secrets."""
    flags = getattr(training_args, "flags", None)
    if flags is None:
        flags = {one.name: getattr(training_args, one.name) for one in fields(training_args)}
    kept = {
        name: value
        for name, value in flags.items()
        if name not in WITHOUT_EFFECT and not name.startswith(WITHOUT_EFFECT_BEGIN)
    }
    return json.loads(json.dumps(kept, default=str))


def zero_stage(training_args) -> int | None:
    """The stage of DeepSpeed's ZeRO; None without DeepSpeed."""
    config = getattr(training_args, "hf_deepspeed_config", None)
    return None if config is None else int(config.get_value("zero_optimization.stage", 0))


class Resumption:
    """What a run brings along from the checkpoint that it goes on from; nothing where it begins."""

    def __init__(self, checkpoint: str | None = None):
        self.checkpoint, self.step, self.run = checkpoint, 0, {}
        self.without_better = 0  # evaluations in a row, for early stopping
        self._other_metric = False
        self.changed: dict[str, tuple] = {}
        self.optimizer = ""
        self._noted: list[dict] = []
        self._state: dict = {"log_history": []}
        if checkpoint is not None:
            self._state = json.loads((Path(checkpoint) / checkpoints.STATE).read_text())
            self.step = self._state["global_step"]
            self.without_better = evaluations_without_better(self._state)
            self.run = (checkpoints.read_manifest(Path(checkpoint)) or {}).get("run", {})

    @staticmethod
    def facts(trainer: GaudiTrainer) -> dict:
        """For the manifest of a checkpoint."""
        args, dataset = trainer.args, trainer.train_dataset
        return {
            "flags": decisive_flags(args),
            "ranks": args.world_size,
            "zero_stage": zero_stage(args),
            "optimizer": trainer.resumption.optimizer,
            "greater_is_better": args.greater_is_better,
            **trainer.digests,
            "rows": len(dataset) if isinstance(dataset, datasets.Dataset) else None,
            "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * data_ranks(args)[1],
            "steps_per_epoch": trainer.steps_per_epoch,
        }

    @classmethod
    def of(cls, trainer: GaudiTrainer, checkpoint: str | None) -> Resumption:
        """Compare a checkpoint with this run, and say what has changed.

        Raises:
            UserError: it cannot be resumed from with what has changed.
        """
        resumption = cls(checkpoint)
        resumption._compare_metric(trainer)
        if checkpoint is not None and resumption.run:
            resumption._compare(trainer)
        return resumption

    def _compare(self, trainer: GaudiTrainer) -> None:
        args, run = trainer.args, self.run
        if zero_stage(args) != run["zero_stage"] or (zero_stage(args) is not None and args.world_size != run["ranks"]):
            stages = [
                "without DeepSpeed" if s is None else f"by ZeRO-{s}" for s in (run["zero_stage"], zero_stage(args))
            ]
            raise UserError(
                f"{self.checkpoint} was written {stages[0]} on {run['ranks']} ranks, this run trains {stages[1]} on "
                f"{args.world_size}: its optimizer state does not fit; continue as before, or start a new run from "
                "its weights by --model_name_or_path and another --output_dir"
            )
        flags = decisive_flags(args)
        then = run["flags"]
        self.changed = {
            name: (then.get(name), flags.get(name))
            for name in sorted({*then, *flags})
            if then.get(name) != flags.get(name)
        }
        if args.world_size != run["ranks"]:
            self.changed["world_size"] = (run["ranks"], args.world_size)
        if trainer.digests["model"] != run["model"]:
            raise UserError(
                f"{self.checkpoint}: the weights that are trained have other names or shapes now"
                f"{self._listed(most=4)}; continue with the same model, or choose another --output_dir"
            )
        if self.changed.get("lr_scheduler_type", ("",))[0] == "reduce_lr_on_plateau":
            raise UserError(
                f"{self.checkpoint}: its --lr_scheduler_type reduce_lr_on_plateau followed the metric, and no "
                "schedule of steps goes on from it: give it again, or start a new run from its weights by "
                "--model_name_or_path and another --output_dir"
            )
        if self.changed:
            logger.warning("changed since %s:%s", self.checkpoint, self._listed())

    def _listed(self, most: int | None = None) -> str:
        parts = [f" --{name} {now} (was {before})" for name, (before, now) in self.changed.items()]
        more = len(parts[most:]) if most else 0
        return ",".join(parts[:most]) + (f", and {more} more flags" if more else "")

    def follows(self, checkpoint: Path) -> bool:
        """Whether the one that training resumes from came after this one: it has all that this one has logged."""
        try:
            rows = json.loads((checkpoint / checkpoints.STATE).read_text())["log_history"]
        except (OSError, ValueError, KeyError):
            return True  # it is damaged, and never taken
        return json.dumps(rows) == json.dumps(self._state["log_history"][: len(rows)])  # NaN does not equal itself

    def restore(self, trainer: GaudiTrainer) -> None:
        """When training begins: a word about random states and the order of the data."""
        if self.checkpoint is None:
            return
        trainer.state.num_train_epochs = trainer.epochs
        if self._other_metric:
            trainer.state.best_metric = trainer.state.best_model_checkpoint = trainer.state.best_global_step = None
            trainer.state.stateful_callbacks.pop(EarlyStopping.__name__, None)
        if trainer.state.best_model_checkpoint is not None:
            best = Path(trainer.args.output_dir, Path(trainer.state.best_model_checkpoint).name)
            if best.is_dir():  # the folder may have another name by now
                trainer.state.best_model_checkpoint = str(best)
            elif not Path(trainer.state.best_model_checkpoint).is_dir():
                logger.warning("%s, the best checkpoint, is gone", trainer.state.best_model_checkpoint)
                trainer.state.best_model_checkpoint = trainer.state.best_metric = None
        own = f"rng_state_{trainer.args.process_index}.pth" if trainer.args.world_size > 1 else "rng_state.pth"
        if not all(gather(Path(self.checkpoint, own).is_file())):
            logger.warning("%s has no RNG state for this number of ranks: a new one is used", self.checkpoint)
        elif trainer.args.use_habana and self.changed.get("use_habana"):
            logger.warning("%s has no RNG state of a card: a new one is used", self.checkpoint)
        if self.run:
            self._say_order(Resumption.facts(trainer))

    def _compare_metric(self, trainer: GaudiTrainer) -> None:
        """A best value is of the metric and the data that it was computed from, and says nothing about others."""
        metric, state = trainer.args.metric_for_best_model, self._state
        if metric is None or state.get("best_metric") is None:
            return
        name = f"eval_{metric.removeprefix('eval_')}"
        values = [row.get(name) for row in state["log_history"] if row["step"] == state.get("best_global_step")]
        data, greater = trainer.digests["eval_data"], trainer.args.greater_is_better
        then = self.run.get("eval_data", data)
        if values and state["best_metric"] not in values:
            reason = f"--metric_for_best_model {metric}: the best model so far was chosen by another metric"
        elif then.keys() != data.keys() or not all(may_be_same(then[name], data[name]) for name in data):
            reason = "the evaluation data are not those of the checkpoint, by which the best model so far was chosen"
        elif self.run.get("greater_is_better", greater) != greater:
            reason = "--greater_is_better: the best model so far was chosen the other way round"
        else:
            return
        logger.warning("%s: it no longer counts", reason)
        self._other_metric, self.without_better = True, 0

    def _say_order(self, now: dict) -> None:
        then, step = self.run, self.step
        order = ORDER if now["rows"] is not None else {"ignore_data_skip"}  # a stream is read as it comes
        shared_anew = now["rows"] is None and now["ranks"] != then["ranks"]
        same = shared_anew or may_be_same(then["data"], now["data"])
        if not same or now["rows"] != then["rows"]:
            known = None not in (now["rows"], then["rows"])  # of a stream nobody knows
            rows = f" ({now['rows']} rows, {then['rows']} before)" if known and now["rows"] != then["rows"] else ""
            logger.warning(
                "the training data are not those of the checkpoint%s: training continues in their own order, after "
                "step %d of %d of epoch %d", rows, step % now["steps_per_epoch"], now["steps_per_epoch"],
                step // now["steps_per_epoch"] + 1,
            )  # fmt: skip
        elif order.intersection(self.changed) or shared_anew:
            logger.warning(
                "the order of the data is another one than before: in this epoch, some rows come a second time and "
                "others not at all"
            )
        elif now["rows_per_step"] != then["rows_per_step"]:
            before, after = (_rows_done(step, facts) for facts in (then, now))
            what = "come a second time" if after < before else "are left out"
            logger.warning(
                "a step takes %d rows, %d before: after %d steps, training continues at row %d, not %d, so %d rows %s",
                now["rows_per_step"], then["rows_per_step"], step, after, before, abs(after - before), what,
            )  # fmt: skip
        elif {"per_device_train_batch_size", "gradient_accumulation_steps", "world_size"}.intersection(self.changed):
            logger.warning("each step still takes the same %d rows in the same order", now["rows_per_step"])

    def note_flags(self, optimizer, training_args) -> None:
        """What the flags of this start give an optimizer, before a checkpoint overwrites it.

        Raises:
            UserError: the checkpoint holds the state of another one.
        """
        self.optimizer, groups = type(optimizer).__name__, getattr(optimizer, "param_groups", None)
        if groups is None:  # DeepSpeed makes it later, with one group
            config = training_args.hf_deepspeed_config.get_value("optimizer")
            self.optimizer, values = config["type"], config.get("params", {})
            groups = [{name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}]
        before = self.run.get("optimizer", self.optimizer)
        if before != self.optimizer:
            raise UserError(
                f"{self.checkpoint} holds the state of the optimizer {before}, this run has {self.optimizer} "
                "(--optim, the kind of card, the Gaudi and the DeepSpeed configuration choose it): continue as "
                "before, or start a new run from its weights by --model_name_or_path and another --output_dir"
            )
        self._check_groups(getattr(optimizer, "param_groups", []))
        names = ("lr", "weight_decay", "betas", "eps")
        # Under ZeRO a schedule is there already, which has set the learning rate of the first step.
        groups = [{**group, "lr": group["initial_lr"]} if "initial_lr" in group else group for group in groups]
        self._noted = [{name: group[name] for name in names if name in group} for group in groups]

    def _check_groups(self, groups: list[dict]) -> None:
        """Raise a UserError where a checkpoint of another tool holds the state of another optimizer, or model."""
        path = Path(self.checkpoint or "", "optimizer.pt")
        if self.checkpoint is None or self.run or not path.is_file():
            return
        saved = torch.load(path, map_location="meta", weights_only=True)["param_groups"]
        kinds = {"betas", "beta1", "momentum", "lr_decay"}  # of Adam, Adafactor, SGD and RMSprop, Adagrad
        then, now = ([(len(one["params"]), kinds & one.keys()) for one in ones] for ones in (saved, groups))
        if then != now:
            raise UserError(
                f"{path}: this is the state of another optimizer than --optim chooses, or of another model: continue "
                "as before, or start a new run from the weights by --model_name_or_path"
            )

    def apply_flags(self, optimizer, scheduler) -> None:
        """Let the flags of this start win over the values in the checkpoint, and say where they differ."""
        if self.checkpoint is None or len(self._noted) != len(optimizer.param_groups):
            return
        said: dict[str, str] = {}
        scheduler = getattr(scheduler, "scheduler", scheduler)  # without what DeepSpeed's is wrapped in
        follows = isinstance(scheduler, LambdaLR)
        for index, (group, noted) in enumerate(zip(optimizer.param_groups, self._noted, strict=True)):
            before = {**group, "lr": group.get("initial_lr", group["lr"])}
            for name, value in noted.items():
                if before[name] not in (value, list(value) if isinstance(value, tuple) else value):
                    said[name] = f"{name} {value} (was {before[name]})"
                if name != "lr":
                    group[name] = value
            if follows:
                scheduler.base_lrs[index] = group["initial_lr"] = noted["lr"]
                group["lr"] = noted["lr"] * scheduler.lr_lambdas[index](scheduler.last_epoch)
                scheduler._last_lr[index] = group["lr"]
        if "lr" in said and not follows:  # which has changed it meanwhile
            del said["lr"]
            now = self.changed.get("learning_rate")
            if now and isinstance(scheduler, ReduceLROnPlateau):  # those of DeepSpeed go by its configuration
                said["lr"] = f"the learning rate that its schedule has reached, not --learning_rate {now[1]}"
        if said:
            logger.warning("the optimizer continues with %s", ", ".join(said.values()))


def _rows_done(step: int, facts: dict) -> int:
    """Rows that a run has taken in ``step`` steps, over all epochs."""
    epochs, steps = divmod(step, facts["steps_per_epoch"])
    return epochs * (facts["rows"] or 0) + steps * facts["rows_per_step"]

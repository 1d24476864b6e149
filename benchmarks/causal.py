"""Causal language modelling: run_clm.py's trainer against a hand-written loop, and LoRA on packed rows."""

import sys
import tempfile

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import TrainerCallback

from gaudi_lm.data.packing import PackedCollator, pack_sequences
from gaudi_lm.modeling.activations import fuse_activations
from gaudi_lm.modeling.loss import install_token_loss

from .measure import MIB, Pace, median, paired_ratio, race, sgemm, write_report
from .workloads import flop_per_token, gpt2, llama_100m

LENGTH = 512
BATCH = 4  # as in the README's commands


def blocks(vocabulary: int, rows: int = 512) -> np.ndarray:
    """Random blocks, int32 of shape [rows, LENGTH]: what is in a block does not change the time it takes."""
    return np.random.default_rng(0).integers(vocabulary, size=(rows, LENGTH), dtype=np.int32)


def hand_written(pace: Pace) -> None:
    """A contender: a training loop as one writes it oneself, with SDPA, fused AdamW, clipping and full logits."""
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0, fused=True)
    data = torch.from_numpy(blocks(model.config.vocab_size))
    step = 0
    while True:
        pace.lap(tokens=BATCH * LENGTH)
        index = step * BATCH % len(data)
        input_ids = data[index : index + BATCH].long()
        logits = model(input_ids=input_ids, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), input_ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1


def trainer(pace: Pace) -> None:
    """A contender: the trainer that run_clm.py builds, with its defaults."""
    sys.argv = ["run_clm.py", "--use_cpu"]
    from gaudi_lm.arguments.definitions import LMTrainingArguments
    from gaudi_lm.training.trainer import build_trainer
    from run_clm import collate_blocks

    class Laps(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            pace.lap()

        def on_step_end(self, *args, **kwargs):
            pace.lap(tokens=BATCH * LENGTH)

    model = gpt2()
    fuse_activations(model)  # as load_model does
    with tempfile.TemporaryDirectory() as folder:
        arguments = LMTrainingArguments(
            output_dir=folder,
            use_cpu=True,
            do_train=True,
            per_device_train_batch_size=BATCH,
            max_steps=10**6,
            logging_steps=10**6,
            save_strategy="no",
            disable_tqdm=True,
        )
        data = Dataset.from_dict({"input_ids": blocks(model.config.vocab_size)})
        build_trainer(model, "causal", arguments, None, collate_blocks, train_dataset=data, callbacks=[Laps()]).train()


def _race_clm(rounds: int) -> tuple[dict, dict]:
    turns = race({"ours": (trainer, {}), "loop": (hand_written, {}), "sgemm": (sgemm, {})}, rounds)
    per_token = flop_per_token(gpt2(), LENGTH)
    limit = median([{"rate": t["flop"] / t["seconds"]} for t in turns["sgemm"]], "rate")
    figures = {"batch": BATCH, "flop_per_token": per_token, "sgemm_gflop_per_second": limit / 1e9}
    for who in ("ours", "loop"):
        seconds = median(turns[who])
        figures[f"{who}_tokens_per_second"] = BATCH * LENGTH / seconds
        figures[f"{who}_share_of_sgemm"] = BATCH * LENGTH * per_token / seconds / limit
        figures[f"{who}_added_memory_mib"] = median(turns[who], "added_memory") / MIB
    figures["speed_ratio_by_cpu_time"] = paired_ratio(turns["loop"], turns["ours"], "cpu_seconds")
    cpu_limit = median([{"rate": t["flop"] / t["cpu_seconds"]} for t in turns["sgemm"]], "rate")
    flop = BATCH * LENGTH * per_token
    figures["ours_share_of_sgemm_by_cpu_time"] = flop / median(turns["ours"], "cpu_seconds") / cpu_limit
    figures["added_memory_ratio"] = paired_ratio(turns["ours"], turns["loop"], "added_memory")
    return turns, figures


def clm_step(rounds: int = 9) -> None:
    """run_clm.py's trainer step against the hand-written loop; the same run answers clm_limit."""
    turns, figures = _race_clm(rounds)
    ratio = paired_ratio(turns["loop"], turns["ours"])
    met = ratio >= 1.0 and figures["added_memory_ratio"] <= 0.6
    write_report("clm_step", ratio, ">= 1.0 tokens/s, <= 0.6 added peak memory", met, figures)
    rate = [{"flop": BATCH * LENGTH * figures["flop_per_token"] / t["seconds"]} for t in turns["ours"]]
    limit = [{"flop": t["flop"] / t["seconds"]} for t in turns["sgemm"]]
    share = paired_ratio(rate, limit, "flop")
    write_report("clm_limit", share, ">= 0.75", share >= 0.75, figures)


def alpaca_like_lengths() -> np.ndarray:
    """Lengths of 2,000 texts in tokens, like those of Alpaca's examples in their prompt template.

    Log-normal, median 90, mean about 102, 1 % above 280: the template alone has about 40 tokens.
    """
    drawn = 40 + np.random.default_rng(0).lognormal(np.log(50), 0.7, 2000)
    return np.minimum(drawn.astype(int), LENGTH)


def lora(pace: Pace, batches: list[dict], cheap_loss: bool) -> None:
    """A contender: LoRA steps on a Llama of 100 million parameters."""
    adapters = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(llama_100m(), adapters)
    if cheap_loss:
        install_token_loss(model, "causal")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    step = 0
    while True:
        batch = batches[step % len(batches)]
        pace.lap(tokens=batch["tokens"])
        inputs = {name: value for name, value in batch.items() if name != "tokens"}
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1


def lora_packed(rounds: int = 9) -> None:
    """Packed rows and the loss of a frozen head against rows padded to 512 and full logits."""
    generator = np.random.default_rng(0)
    texts, labels = [], []
    for length in alpaca_like_lengths():
        ids = generator.integers(3, 32000, length)
        texts.append(ids)
        # The prompt, about half of an example, is no target.
        labels.append(np.where(np.arange(length) < length // 2, -100, ids))
    data = Dataset.from_dict({"input_ids": texts, "labels": labels})
    packed = pack_sequences(data, LENGTH).shuffle(seed=0).with_format("numpy")
    collate = PackedCollator.for_model(llama_100m(), 0, LENGTH)
    rows = [packed[index] for index in range(len(packed))]
    ours, theirs = [], []
    for index in range(0, len(rows) - BATCH, BATCH):
        chosen = rows[index : index + BATCH]
        ours.append(collate(chosen) | {"tokens": int(sum(len(row["input_ids"]) for row in chosen))})
    for index in range(0, len(texts) - BATCH, BATCH):
        input_ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        targets = torch.full((BATCH, LENGTH), -100)
        attention_mask = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        for row in range(BATCH):
            length = len(texts[index + row])
            input_ids[row, :length] = torch.from_numpy(texts[index + row])
            targets[row, :length] = torch.from_numpy(labels[index + row])
            attention_mask[row, :length] = 1
        tokens = int(attention_mask.sum())
        theirs.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": targets, "tokens": tokens})
    turns = race(
        {
            "packed": (lora, {"batches": ours, "cheap_loss": True}),
            "padded": (lora, {"batches": theirs, "cheap_loss": False}),
            "sgemm": (sgemm, {}),
        },
        rounds,
    )
    per_token = flop_per_token(llama_100m(), LENGTH, frozen=True)
    limit = median([{"rate": t["flop"] / t["seconds"]} for t in turns["sgemm"]], "rate")
    speed = {who: [{"speed": t["tokens"] / t["seconds"]} for t in turns[who]] for who in ("packed", "padded")}
    per_cpu = {who: [{"speed": t["tokens"] / t["cpu_seconds"]} for t in turns[who]] for who in ("packed", "padded")}
    mean = float(np.mean([len(text) for text in texts]))
    figures = {
        "ratio_by_cpu_time": paired_ratio(per_cpu["packed"], per_cpu["padded"], "speed"),
        "batch": BATCH,
        "mean_tokens_per_text": mean,
        "positions_used_packed": sum(map(len, texts)) / (len(packed) * LENGTH),
        "positions_used_padded": mean / LENGTH,
        "flop_per_token": per_token,
        "sgemm_gflop_per_second": limit / 1e9,
    }
    for who in ("packed", "padded"):
        figures[f"{who}_tokens_per_second"] = median(speed[who], "speed")
        figures[f"{who}_share_of_sgemm"] = median(speed[who], "speed") * per_token / limit
        figures[f"{who}_added_memory_mib"] = median(turns[who], "added_memory") / MIB
    ratio = paired_ratio(speed["packed"], speed["padded"], "speed")
    write_report("lora_packed", ratio, ">= 4", ratio >= 4, figures)

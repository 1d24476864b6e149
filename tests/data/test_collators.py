"""Collators of transformers in place of the scripts' own: as they are, and with the same counts and losses."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import copy_elsewhere, load_script, losses, results, run
from short_runs import scratch
from transformers import default_data_collator

from gaudi_lm.data.sampling import (
    FILLER_SAMPLE,
    REAL_SAMPLES,
    SAMPLE_ID,
    count_tokens,
    cut_rows,
    ignore_filler_samples,
)
from gaudi_lm.errors import UserError
from gaudi_lm.training.trainer import LMTrainer

TRAINING = ("--do_train", "--do_eval", "--max_steps", 3, "--gradient_accumulation_steps", 2, "--max_eval_samples", 6)


def changed(script: str, folder, *changes: tuple[str, str]):
    copy = copy_elsewhere(script, folder)
    text = copy.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    copy.write_text(text)
    return copy


IMPORT = "from transformers import AutoModelForCausalLM,"
USE = "        collate_blocks,\n"


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_standard_collators_of_blocks(assets, tmp_path, streaming):
    """The same losses, to the bit, as with the script's own collator."""
    more = (*TRAINING, *(["--streaming"] if streaming else []))
    run("run_clm.py", *scratch(assets, tmp_path / "own", *more))
    default = changed(
        "run_clm.py", tmp_path / "a",
        (IMPORT, f"{IMPORT} default_data_collator,"), (USE, "        default_data_collator,\n"),
    )  # fmt: skip
    modeling = changed(
        "run_clm.py", tmp_path / "b",
        (IMPORT, f"{IMPORT} DataCollatorForLanguageModeling,"),
        ("    # Trainer\n", "    tokenizer.add_special_tokens({'pad_token': '<pad>'})\n"),
        (USE, "        DataCollatorForLanguageModeling(tokenizer, mlm=False),\n"),
    )  # fmt: skip
    for name, script in {"default": default, "modeling": modeling}.items():
        run(script, *scratch(assets, tmp_path / name, *more))
        assert losses(tmp_path / name) == losses(tmp_path / "own")
        for figure in ("eval_loss", "eval_tokens", "eval_samples", "train_loss"):
            assert results(tmp_path / name)[figure] == results(tmp_path / "own")[figure]


def test_a_masked_model_needs_a_collator_that_makes_labels():
    trainer = SimpleNamespace(throughput=SimpleNamespace(begin_step=lambda: None))
    for batch in ({"input_ids": torch.ones(1, 4)}, {"input_ids": torch.ones(1, 4), "labels": None}):
        with pytest.raises(UserError, match="the collator makes no labels: a masked language model cannot be trained"):
            LMTrainer.get_batch_samples_transformers(trainer, iter([batch]), 1, torch.device("cpu"))


BLOCKS = "    model = load_model("


@pytest.mark.slow
def test_rows_of_ones_own(assets, tmp_path):
    """Their labels are used, in training and evaluation: of each row the last four tokens."""
    rows = "[{'input_ids': list(range(3, size)), 'labels': [-100] * (size - 7) + list(range(size - 4, size))}"
    own = (
        f"    data = Dataset.from_list({rows} for size in SIZES])\n    blocks = dict.fromkeys(blocks, data)\n{BLOCKS}"
    )
    script = changed("run_clm.py", tmp_path / "a", (BLOCKS, own.replace("SIZES", "[11] * 12")))
    log = run(script, *scratch(assets, tmp_path / "own", *TRAINING, "--show_examples", 1)).stderr
    (sample,) = [line for line in log.splitlines() if "sample 0" in line]
    assert not sample.split(": ", 1)[1].startswith(("'>>>", '">>>'))
    assert results(tmp_path / "own")["eval_tokens"] == 12 * 4
    padded = changed(
        "run_clm.py", tmp_path / "b", (BLOCKS, own.replace("SIZES", "[9, 11] * 6")),
        (IMPORT, f"{IMPORT} DataCollatorForSeq2Seq,"),
        ("    # Trainer\n", "    tokenizer.pad_token = tokenizer.eos_token\n"),
        (USE, "        DataCollatorForSeq2Seq(tokenizer),\n"),
    )  # fmt: skip
    run(padded, *scratch(assets, tmp_path / "padded", *TRAINING))
    assert results(tmp_path / "padded")["eval_tokens"] == 12 * 4


def test_rows_that_are_padded_already():
    """Padding is neither seen, nor a label, nor counted, as a tokenizer with `padding="max_length"` marks it."""
    rows = [
        {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]},
    ]
    batch = ignore_filler_samples(load_script("run_clm").collate_blocks, labels_from_inputs=True)(rows)
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [5, 6, -100, -100]]
    assert batch["attention_mask"].tolist() == [row["attention_mask"] for row in rows]
    assert count_tokens(batch) == (2, 6, 8)


def test_positions_of_rows_that_are_packed_already_are_kept():
    """transformers keeps texts apart by them, and numbers each from 0."""
    rows = [{"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}]
    assert load_script("run_clm").collate_blocks(rows)["position_ids"].tolist() == [[0, 1, 0, 1]]


def test_rows_of_several_lengths_are_one_line():
    collate = load_script("run_clm").collate_blocks
    with pytest.raises(UserError, match="input_ids have 3 and 5 tokens.*DataCollatorForSeq2Seq"):
        collate([{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 3, 4, 5]}])
    with pytest.raises(UserError, match="input_ids and labels have 2 and 3 tokens"):
        collate([{"input_ids": [1, 2, 3], "labels": [1, 2]}])


@pytest.mark.slow
def test_standard_collator_of_masks(assets, masked_assets, tmp_path):
    script = changed(
        "run_mlm.py", tmp_path / "mine",
        ("from transformers import AutoModelForMaskedLM,", "from transformers import AutoModelForMaskedLM, "
         "DataCollatorForLanguageModeling,"),
        ("        collator,\n", "        DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),\n"),
        ("        evaluation_collator=replace(collator, seed=(EVALUATION_SEED,)),\n"
         "        max_predictions_per_seq=collator.masked_token_budget,\n", ""),
    )  # fmt: skip
    texts = ["--train_file", assets.train, "--validation_file", assets.validation, "--max_seq_length", 32]
    flags = [*masked_assets.scratch("bert"), *texts, "--line_by_line", "--use_cpu", "--logging_steps", 1, *TRAINING]
    run(script, *flags, "--output_dir", tmp_path / "out")
    assert len(losses(tmp_path / "out")) == 3
    assert 0 < results(tmp_path / "out")["eval_tokens"] < 6 * 32


class Recorder:
    """Keeps the rows that it gets."""

    def __init__(self, needs_sample_id: bool):
        self.needs_sample_id = needs_sample_id

    def __call__(self, rows):
        self.rows = rows
        return {"input_ids": torch.tensor([row["input_ids"] for row in rows], dtype=torch.int32)}


def test_what_a_collator_draws_depends_on_the_batch_and_the_seed():
    def draw(rows):
        numbers = torch.rand(()), torch.tensor(np.random.rand()), torch.tensor(random.random())
        return {"input_ids": torch.stack(numbers).mul(2**20)[None], "labels": None}

    def drawn(sample_id: int, *seed: int) -> list[int]:
        return ignore_filler_samples(draw, seed=seed)([{"input_ids": [1], SAMPLE_ID: sample_id}])["input_ids"].tolist()

    torch.manual_seed(5)
    after = torch.rand(())
    torch.manual_seed(5)
    assert drawn(3, 1) == drawn(3, 1) and len({str(drawn(*of)) for of in [(3, 1), (4, 1), (3, 2)]}) == 3
    assert torch.rand(()) == after, "dropout does not depend on it"


@pytest.mark.parametrize("needs", [False, True])
def test_the_sample_id_reaches_a_collator_that_asks(needs):
    rows = [{"input_ids": [1, 2], SAMPLE_ID: 7}, {"input_ids": [3, 4], SAMPLE_ID: 8, FILLER_SAMPLE: True}]
    recorder = Recorder(needs)
    batch = ignore_filler_samples(recorder, labels_from_inputs=True)(rows)
    assert [row.get(SAMPLE_ID) for row in recorder.rows] == ([7, 8] if needs else [None, None])
    assert set(batch) == {"input_ids", "labels", REAL_SAMPLES} and batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [[1, 2], [-100, -100]] and batch[REAL_SAMPLES].tolist() == [True, False]


def test_padding_is_no_label():
    def collate(rows):
        return default_data_collator([{**row, "attention_mask": [1, 0]} for row in rows])

    batch = ignore_filler_samples(collate, labels_from_inputs=True)([{"input_ids": [1, 2], SAMPLE_ID: 0}])
    assert batch["labels"].tolist() == [[1, -100]]
    assert "labels" not in ignore_filler_samples(collate)([{"input_ids": [1, 2]}])


def test_parts_of_rows_have_all_labels_once():
    """A part brings along the label that its last token predicts, which is the first of the next part."""
    ids = torch.arange(24).reshape(2, 12)
    batch = {
        "input_ids": ids,
        "labels": ids + 100,
        "attention_mask": torch.ones_like(ids),
        "real_rows": ids[:, 0] >= 0,
    }
    parts = [cut_rows(batch, part, 2) for part in range(2)]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts], 1), ids)
    assert [part["labels"].shape[1] for part in parts] == [7, 7] and parts[0]["attention_mask"].shape == (2, 6)
    assert [part["position_ids"].tolist() for part in parts] == [[list(range(6))] * 2, [list(range(6, 12))] * 2]
    predicted = torch.cat([part["labels"][:, 1:] for part in parts], 1)
    assert torch.equal(predicted[:, :-1], batch["labels"][:, 1:]) and predicted[:, -1].tolist() == [-100, -100]
    with pytest.raises(UserError, match=r"^--context_parallel_size 5: rows of 12 tokens are no multiple of 25$"):
        cut_rows(batch, 0, 5)

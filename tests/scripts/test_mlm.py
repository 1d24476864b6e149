"""run_mlm.py: masks, rows, and runs as a user makes them."""

import itertools
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from running import (
    check_refused,
    copy_elsewhere,
    environment,
    load_script,
    losses,
    results,
    run,
    run_several,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gaudi_lm.data.masked_token_budget import default_budget
from gaudi_lm.data.masking import MaskingCollator, encode_lines, sequence_ends
from gaudi_lm.data.ragged import bucket_lengths, join_rows, pad_rows, shorten_rows
from gaudi_lm.data.tokenization import special_ends, vocabulary_size
from gaudi_lm.errors import UserError
from gaudi_lm.training.evaluation import evaluation_loader

MLM = load_script("run_mlm")
FAMILIES = ["bert", "roberta", "distilbert", "albert"]


@pytest.fixture(scope="module")
def tokenizer(masked_assets):
    return AutoTokenizer.from_pretrained(masked_assets.roberta)


def rows_of(tokenizer, count: int, length: int, seed: int = 0) -> list[dict]:
    tokens = np.random.default_rng(seed).integers(5, len(tokenizer), (count, length), dtype=np.int32)
    return [{"input_ids": row, "sample_id": number} for number, row in enumerate(tokens)]


def test_masks_are_80_10_10(tokenizer):
    rows = rows_of(tokenizer, 400, 250)
    original = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    batch = MaskingCollator(tokenizer, 0.15, seed=(1,))(rows)
    chosen = batch["labels"] != -100
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    count = chosen.sum().item()
    assert count / original.numel() == pytest.approx(0.15, abs=0.005)  # 4 standard deviations
    masked = batch["input_ids"] == tokenizer.mask_token_id
    assert masked.sum().item() / count == pytest.approx(0.8, abs=0.015)
    kept = (batch["input_ids"] == original)[chosen].sum().item()
    assert kept / count == pytest.approx(0.1, abs=0.012)
    replaced = batch["input_ids"][chosen & ~masked & (batch["input_ids"] != original)]
    assert not set(replaced.tolist()) & set(tokenizer.all_special_ids)
    assert len(set(replaced.tolist())) > 0.9 * (len(tokenizer) - 5)


def test_special_tokens_and_padding_are_never_masked(tokenizer):
    start, end = sequence_ends(tokenizer, 64)
    rows = [{**row, "input_ids": row["input_ids"][: 3 + 2 * n]} for n, row in enumerate(rows_of(tokenizer, 9, 30))]
    batch = MaskingCollator(tokenizer, 1.0, seed=(1,), start=start, end=end)(rows)
    assert (start, end) == ([0], [2])
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["labels"][index].tolist() == [-100, *row["input_ids"], *[-100] * (20 - length)]
        assert batch["attention_mask"][index].tolist() == [1] * (length + 2) + [0] * (19 - length)
        assert batch["input_ids"][index, 0] == 0 and batch["input_ids"][index, length + 1] == 2
        assert (batch["input_ids"][index, length + 2 :] == tokenizer.pad_token_id).all()
    for lengths, masked in (([], False), ([40], True)):
        batch = MaskingCollator(tokenizer, 1.0, seed=(1,), lengths=lengths)(rows_of(tokenizer, 2, 40))
        assert ("attention_mask" in batch) == masked, "batches of chosen lengths have the same inputs"


def test_rows_that_are_padded_already_are_padded_anew(tokenizer):
    """Their own mask counts, as a tokenizer with `padding="max_length"` makes it."""
    rows = rows_of(tokenizer, 2, 6)
    rows[1]["attention_mask"] = np.array([1, 1, 1, 1, 0, 0])
    short = {**rows[1], "input_ids": rows[1]["input_ids"][:4]}
    del short["attention_mask"]
    collate = MaskingCollator(tokenizer, 0.3, seed=(1,))
    batch, wanted = collate(rows), collate([rows[0], short])
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_a_mask_depends_on_seed_and_draw_alone(tokenizer):
    rows = rows_of(tokenizer, 6, 40)
    collator = MaskingCollator(tokenizer, 0.3, seed=(7,))
    together = collator(rows)
    alone = [MaskingCollator(tokenizer, 0.3, seed=(7,), lengths=[64])([row]) for row in reversed(rows)]
    for index, batch in enumerate(reversed(alone)):
        assert torch.equal(batch["input_ids"][0, :40], together["input_ids"][index])
        assert torch.equal(batch["labels"][0, :40], together["labels"][index])
    next_epoch = collator([{**row, "sample_id": row["sample_id"] + 6} for row in rows])
    other_seed = MaskingCollator(tokenizer, 0.3, seed=(8,))(rows)
    for other in (next_epoch, other_seed):
        assert not any(torch.equal(a, b) for a, b in zip(other["labels"], together["labels"], strict=True))


def test_shares_of_the_chosen_tokens(tokenizer):
    """As a copy of the script may set them; the same tokens are chosen."""
    rows = rows_of(tokenizer, 20, 100)
    shares = {"masks": (1.0, 0.0), "random": (0.0, 1.0), "kept": (0.0, 0.0), "usual": (0.8, 0.1)}
    batches = {name: MaskingCollator(tokenizer, 0.3, (7,), *pair)(rows) for name, pair in shares.items()}
    chosen = batches["usual"]["labels"] != -100
    seen = {name: batch["input_ids"][chosen] for name, batch in batches.items()}
    assert all(torch.equal(batch["labels"], batches["usual"]["labels"]) for batch in batches.values())
    targets = batches["usual"]["labels"][chosen]
    assert (seen["masks"] == tokenizer.mask_token_id).all() and torch.equal(seen["kept"], targets)
    assert (seen["random"] != tokenizer.mask_token_id).all() and (seen["random"] != targets).float().mean() > 0.9
    with pytest.raises(ValueError, match="together at most 1"):
        MaskingCollator(tokenizer, 0.3, (7,), mask_share=0.8, random_share=0.3)


@pytest.mark.parametrize("kind", [models.WordLevel, partial(models.BPE, merges=[])])
def test_tokenizers_of_another_script_and_with_holes(kind):
    """One without "a" and without a token for what is unknown, which one refuses and one leaves out; and ids that no
    token has."""
    words = {"[CLS]": 0, "[SEP]": 1, "[PAD]": 2, "[MASK]": 3, "G": 4, "C": 21}
    backend = Tokenizer(kind(words))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", 0), ("[SEP]", 1)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    assert special_ends(tokenizer) == ([0], [1])
    assert len(tokenizer) == 6 and vocabulary_size(tokenizer) == 22
    tokens, lengths = encode_lines(["G C G"], tokenizer, 10)
    assert tokens.tolist() == [0, 4, 21, 4, 1] and lengths.tolist() == [5]
    rows = [{"input_ids": np.array([0, *[4, 21] * 50, 1]), "sample_id": number} for number in range(9)]
    batch = MaskingCollator(tokenizer, 0.9, (7,), mask_share=0.0, random_share=1.0)(rows)
    assert set(batch["input_ids"][batch["labels"] != -100].tolist()) == {4, 21}


def test_surplus_masks_are_undone_and_counted(tokenizer):
    rows = rows_of(tokenizer, 8, 100)
    whole = MaskingCollator(tokenizer, 0.15, seed=(1,))(rows)
    collator = MaskingCollator(tokenizer, 0.15, seed=(1,), masked_token_budget=lambda rows, length: 5 * rows)
    batch, again = collator(rows), collator(rows)
    assert (batch["labels"] != -100).sum() == 40
    assert torch.equal(batch["labels"], again["labels"]) and torch.equal(batch["input_ids"], again["input_ids"])
    assert collator.undone == 2 * ((whole["labels"] != -100).sum() - 40)
    original = torch.from_numpy(np.stack([row["input_ids"] for row in rows])).long()
    assert torch.equal(batch["input_ids"][batch["labels"] == -100], original[batch["labels"] == -100])
    assert default_budget(8, 100, 0.15) > 120


@pytest.mark.parametrize("rows", [1, 9])
def test_what_completes_a_batch_takes_no_masks_of_others(tokenizer, rows):
    """Evaluation is the same at any batch size: rows that are repeated have the masks of the row once more."""
    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows_of(tokenizer, rows, 100)])

    def targets(batch: int, world: int, collator: MaskingCollator) -> int:
        loaders = [evaluation_loader(data, collator, batch, rank, world) for rank in range(world)]
        return sum(int((found["labels"] != -100).sum()) for loader in loaders for found in loader)

    budgets = {lambda rows, length: 3 * rows: 3, partial(default_budget, probability=0.15): 60}
    for budget, seeds in budgets.items():
        for seed in range(seeds):
            collator = MaskingCollator(tokenizer, 0.15, seed=(seed,), masked_token_budget=budget)
            assert len({targets(1, 1, collator), targets(8, 1, collator), targets(4, 2, collator)}) == 1, seed


def test_lines_are_whole_sequences(tokenizer):
    texts = ["one two three", "", "   \n", "a longer line of many words that does not fit\n", "\n", "end"]
    data = Dataset.from_dict({"other": list(range(6)), "text": texts})
    rows = MLM.make_lines(data, tokenizer, "text", 10, None, "train")
    assert rows.column_names == ["input_ids"]
    content = [
        tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"][:8] for text in texts if text.strip()
    ]
    assert rows.with_format(None)["input_ids"][:] == [[0, *line, 2] for line in content]
    assert len(MLM.make_lines(data, tokenizer, "text", 10, 2, "train")) == 2
    tokens, lengths = encode_lines(["x"], tokenizer, 10)
    assert tokens.tolist() == [0, *tokenizer("x", add_special_tokens=False)["input_ids"], 2] and lengths.tolist() == [
        3
    ]


def test_lines_without_a_token_are_no_rows():
    """A normalizer drops characters that are no white space; without special tokens such a row would be empty."""
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[MASK]": 1, "word": 2}))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.WhitespaceSplit()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", mask_token="[MASK]")
    backend.post_processor = processors.TemplateProcessing(single="[MASK] $A", special_tokens=[("[MASK]", 1)])
    ended = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", mask_token="[MASK]")
    texts = ["\u200b", "word word", "\u200b \u200b", "word\u200b", "\ufeff"]
    assert [part.tolist() for part in encode_lines(texts, bare, 9)] == [[2, 2, 2], [2, 1]]
    assert [part.tolist() for part in encode_lines(texts, ended, 9)] == [[1, 2, 2, 1, 2], [3, 2]]
    assert [len(part) for part in encode_lines(["\u200b"], bare, 9)] == [0, 0]
    with pytest.raises(UserError, match="only blank rows"):
        MLM.make_lines(Dataset.from_dict({"text": ["\u200b"]}), bare, "text", 9, None, "train")


lists = st.lists(st.lists(st.integers(-9, 99), max_size=5), min_size=1, max_size=6)


@given(first=lists, data=st.data(), limit=st.integers(1, 6))
def test_rows_against_lists(first, data, limit):
    second = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=len(first), max_size=len(first)))

    def flat(rows):
        tokens = np.array([token for row in rows for token in row], dtype=np.int32)
        return tokens, np.array([len(row) for row in rows])

    joined, lengths = join_rows([7], flat(first), flat(second), [8, 9])
    expected = [[7, *a, *b, 8, 9] for a, b in zip(first, second, strict=True)]
    assert (joined.tolist(), lengths.tolist()) == tuple(part.tolist() for part in flat(expected))
    shorter, lengths = shorten_rows(*flat(first), limit)
    assert (shorter.tolist(), lengths.tolist()) == tuple(part.tolist() for part in flat([r[:limit] for r in first]))
    padded, used = pad_rows([np.array(row, np.int32) for row in first], [], -5, end=[3])
    longest = max(map(len, first)) + 1
    assert padded.tolist() == [[*row, 3, *[-5] * (longest - len(row) - 1)] for row in first]
    assert used.tolist() == [len(row) + 1 for row in first]


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=40), batch=st.integers(1, 4))
def test_chosen_lengths_waste_least(lengths, batch):
    lengths = np.array(lengths)
    chosen = bucket_lengths(lengths, batch, 64)
    ends = sorted({min(-(-length // 8) * 8, 64) for length in lengths.tolist()})

    def waste(ends):
        fits = [0.0, *(float(np.mean(lengths <= end)) ** batch for end in ends)]
        return sum(end * (fit - before) for end, before, fit in zip(ends, fits, fits[1:], strict=False))

    best = min(waste((*some, ends[-1])) for count in range(4) for some in itertools.combinations(ends[:-1], count))
    assert len(chosen) <= 4 and chosen == sorted(chosen) and chosen[-1] >= lengths.max()
    assert waste(chosen) == pytest.approx(best)


def common(assets, output, *more) -> list[str]:
    flags = [
        "--train_file", assets.train, "--validation_file", assets.validation, "--output_dir", output, "--do_eval",
        "--max_eval_samples", 20, "--max_seq_length", 48, "--per_device_train_batch_size", 4, "--logging_steps", 1,
        "--seed", 3, *more,
    ]  # fmt: skip
    return list(map(str, flags))


@pytest.mark.slow
def test_families_and_modes_on_the_cpu(assets, masked_assets, tmp_path):
    """Every family trains in every mode, its loss falls, and what is saved gives the same figures again."""
    modes = {
        "bert": ["--line_by_line"],
        "roberta": [],
        "distilbert": ["--line_by_line", "--pad_to_max_length"],
        "albert": ["--streaming", "--max_steps", "24"],
        "bert packed": ["--line_by_line", "--pack_sequences"],
        "roberta lines streamed": ["--line_by_line", "--streaming", "--max_steps", "24"],
        "roberta limited": ["--max_predictions_per_seq", "3"],
        "bert full head": ["--max_predictions_per_seq", "0", "--low_cpu_mem_usage"],
    }
    runs = []
    for name, mode in modes.items():
        model = [str(flag) for flag in masked_assets.scratch(name.split()[0])]
        training = ["--do_train", "--use_cpu", "--learning_rate", "0.01", "--num_train_epochs", "3"]
        limit = [] if "--streaming" in mode else ["--max_train_samples", "32"]
        runs.append(common(assets, tmp_path / name, *model, *training, *mode, *limit, "--save_strategy", "no"))
    evaluations = [
        common(assets, tmp_path / "again", "--model_name_or_path", tmp_path / name, *modes[name], "--use_cpu")
        for name in modes
    ]
    ends = run_several("run_mlm", runs + evaluations, environment())
    for name, end, again in zip(modes, ends, ends[len(modes) :], strict=False):
        assert end.status == again.status == 0, f"{name}: {end.log} {again.log}"
        assert (tmp_path / name / "model.safetensors").is_file()
        history = losses(tmp_path / name)
        assert np.mean(history[-4:]) < np.mean(history[:4]) - 0.2, name
        # Evaluation masks come from a fixed seed; and what is saved is what was evaluated.
        assert again.metrics["eval_loss"] == pytest.approx(end.metrics["eval_loss"], rel=1e-6), name
        assert again.metrics["eval_tokens"] == end.metrics["eval_tokens"] > 0
        assert end.metrics["eval_perplexity"] == pytest.approx(np.exp(end.metrics["eval_loss"]))
    undone = re.search(r"(\d+) masks beyond --max_predictions_per_seq were undone", ends[6].log)
    assert undone and int(undone[1]) > 0
    # 3 a sequence of a batch of 8; the third batch is completed with 4 rows whose masks do not count.
    assert 2 * 8 * 3 < ends[6].metrics["eval_tokens"] < 3 * 8 * 3


@pytest.mark.slow
def test_equals_a_plain_loop(assets, masked_assets, tmp_path):
    """Losses of 12 steps as a hand-written loop with the stock model and full logits gives them on the same masks.

    From a copy of the script in a folder of its own.
    """
    from transformers import BertConfig, BertForMaskedLM, set_seed

    flags = common(
        assets, tmp_path / "out", *masked_assets.scratch("bert"), "--do_train", "--use_cpu", "--max_train_samples", 24,
        "--num_train_epochs", 2, "--learning_rate", 1e-3, "--line_by_line",
    )  # fmt: skip
    run(copy_elsewhere("run_mlm.py", tmp_path / "elsewhere"), *flags, cwd=tmp_path / "elsewhere")
    tokenizer = AutoTokenizer.from_pretrained(masked_assets.bert)
    lines = [line for line in assets.train.read_text().splitlines() if line.strip()][:24]
    rows = [np.array(tokenizer(line, truncation=True, max_length=48)["input_ids"]) for line in lines]
    collator = MaskingCollator(tokenizer, 0.15, seed=(3, 0))
    set_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM._from_config(config, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, weight_decay=0.0)
    expected = []
    for epoch in range(2):
        order = np.random.default_rng([3, epoch]).permutation(24)
        for start in range(0, 24, 4):
            batch = collator(
                [{"input_ids": rows[n], "sample_id": epoch * 24 + n} for n in order[start : start + 4].tolist()]
            )
            labels = batch.pop("labels")
            logits = model(**batch).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, len(tokenizer)), labels.view(-1))
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - len(expected) / 12)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            expected.append(loss.item())
    np.testing.assert_allclose(losses(tmp_path / "out"), expected, rtol=1e-5)


@pytest.mark.slow
def test_resume_is_exact(assets, masked_assets, tmp_path):
    """With dropout and masks that are new in each epoch, a resumed run ends with the bits of an uninterrupted one."""
    model = masked_assets.scratch("bert", dropout=True)
    training = ["--do_train", "--use_cpu", "--max_train_samples", 20, "--num_train_epochs", 3, "--save_steps", 7]
    whole = common(assets, tmp_path / "whole", *model, *training)
    again = common(
        assets, tmp_path / "again", *model, *training, "--resume_from_checkpoint", tmp_path / "whole/checkpoint-7"
    )
    ends = run_several("run_mlm", [whole, [*again, "--dataloader_num_workers", "2"]], environment())
    assert [end.status for end in ends] == [0, 0], ends
    assert "WARNING" not in ends[1].log  # such as of missing keys, which are tied to others
    assert len(losses(tmp_path / "whole")) == 15
    assert losses(tmp_path / "again")[7:] == losses(tmp_path / "whole")[7:]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_on_a_simulated_card(assets, masked_assets, tmp_path):
    """The flags of the documentation compile nothing after warm-up, with blocks and with lines of few lengths."""
    card = [
        "--use_habana",
        "--use_lazy_mode",
        "--use_hpu_graphs_for_inference",
        "--gaudi_config_name",
        "Habana/roberta-base",
    ]
    training = ["--do_train", "--max_train_samples", "40", "--num_train_epochs", "2", "--throughput_warmup_steps", "3"]
    modes = {
        "roberta": [],
        "bert": ["--line_by_line"],
        "distilbert": ["--line_by_line", "--pad_to_max_length"],
        "albert": ["--max_predictions_per_seq", "0"],
    }
    runs = [
        common(assets, tmp_path / name, *masked_assets.scratch(name), *card, *training, *mode, "--save_strategy", "no")
        for name, mode in modes.items()
    ]
    ends = run_several("run_mlm", runs, environment(GAUDI_SIMULATOR="1"))
    for name, end in zip(modes, ends, strict=True):
        assert end.status == 0, f"{name}: {end.log}"
        if name != "bert":
            assert end.metrics["graph_compilations_after_warmup"] == 0, f"{name}: {end.log}"
        assert np.isfinite(end.metrics["eval_loss"])
    lengths = re.search(r"padded to one of the lengths \[([\d, ]+)\]", ends[1].log)
    assert lengths and 1 <= len(lengths[1].split(",")) <= 4
    assert results(tmp_path / "bert")["train_padding_share"] < results(tmp_path / "distilbert")["train_padding_share"]


def test_an_evaluation_in_which_no_token_is_masked(assets, masked_assets, tmp_path):
    """Its loss is no number: a warning says why, the card says so, and files of figures are JSON, which has no NaN."""
    (tmp_path / "short.txt").write_text("hello world\n")
    flags = [*masked_assets.scratch("bert"), "--validation_file", tmp_path / "short.txt", "--line_by_line"]
    flags += ["--mlm_probability", 0.001, "--do_eval", "--use_cpu", "--output_dir", tmp_path / "out", "--do_train"]
    flags += ["--train_file", assets.train, "--max_train_samples", 8, "--max_steps", 1, "--save_strategy", "no"]
    log = run("run_mlm.py", *flags).stderr
    assert "the evaluation has no token to predict" in log and "--mlm_probability" in log
    for name in ("all_results.json", "eval_results.json"):
        found = json.loads((tmp_path / "out" / name).read_text(), parse_constant=pytest.fail)
        assert found["eval_tokens"] == 0 and found["eval_loss"] is found["eval_perplexity"] is None
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "| eval loss | nan |" in card.content and not card.data.eval_results


def test_bad_input(assets, masked_assets, tmp_path):
    """One line that names the flag, exit code 2, nothing written."""
    output = tmp_path / "out"
    (tmp_path / "blank.txt").write_text("\n \n")
    model = masked_assets.scratch("bert")
    data = ["--train_file", assets.train]
    end = ["--output_dir", output, "--use_cpu", "--do_train"]
    cases = {
        "probability 0": ([*model, *data, "--mlm_probability", 0], "--mlm_probability 0"),
        "probability 1.5": ([*model, *data, "--mlm_probability", 1.5], "--mlm_probability 1.5"),
        "probability -1": ([*model, *data, "--mlm_probability", -0.1], "--mlm_probability -0.1"),
        "predictions": ([*model, *data, "--max_predictions_per_seq", -1], "--max_predictions_per_seq -1"),
        "padding of blocks": ([*model, *data, "--pad_to_max_length"], "--pad_to_max_length needs --line_by_line"),
        "packed blocks": ([*model, *data, "--pack_sequences"], "--pack_sequences needs --line_by_line"),
        "packed stream": (
            [*model, *data, "--line_by_line", "--pack_sequences", "--streaming", "--max_steps", 3],
            "--pack_sequences cannot be combined with --streaming",
        ),
        "no mask token": (["--model_type", "bert", "--tokenizer_name", assets.tokenizer, *data], "no mask token"),
        "causal model": (["--model_name_or_path", assets.gpt2, "--tokenizer_name", masked_assets.bert, *data], "gpt2"),
        "length": ([*model, *data, "--max_seq_length", 2], "--max_seq_length 2"),
        "length 0": ([*model, *data, "--max_seq_length", 0], "--max_seq_length 0"),
        "no positions": (
            ["--model_type", "roberta", "--config_overrides", "max_position_embeddings=2", *data,
             "--tokenizer_name", masked_assets.roberta],
            "max_position_embeddings: 2 positions, the first of them",
        ),
        "stream without end": ([*model, *data, "--streaming"], "--max_steps"),
        "column": ([*model, *data, "--text_column_name", "words"], "--text_column_name words"),
        "not packable": (
            [*masked_assets.scratch("albert"), *data, "--line_by_line", "--pack_sequences"], "--pack_sequences",
        ),
        "unknown flag": ([*model, *data, "--mlm_probabilty", 0.1], "did you mean --mlm_probability"),
    }  # fmt: skip
    check_refused("run_mlm.py", cases, end, tmp_path, output)

"""Packed rows: each text's loss is what it is alone, for every architecture that is allowed."""

from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CAUSAL, EXPERTS, MASKED, VOCABULARY, tiny_model
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional

from gaudi_lm.architectures import packable
from gaudi_lm.data.packing import PackedCollator, best_fit, pack_sequences
from gaudi_lm.data.sampling import count_tokens
from gaudi_lm.errors import UserError
from gaudi_lm.modeling.loss import install_token_loss

torch.set_num_threads(1)
PAD, LENGTH = 1, 40


def make_texts(lengths):
    generator = np.random.default_rng(0)
    return [generator.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]


def packed_rows(texts):
    packed = pack_sequences(Dataset.from_dict({"input_ids": texts}), LENGTH).with_format("numpy")
    return [packed[index] for index in range(len(packed))]


def token_losses(logits, input_ids, causal):
    """Per-token losses: of predicting the next token, or (masked models) this one."""
    if causal:
        logits, input_ids = logits[:, :-1], input_ids[:, 1:]
    return functional.cross_entropy(logits.float().transpose(1, 2), input_ids, reduction="none")


def worst_difference(model, device="cpu"):
    """The largest difference of a token's loss between packed rows and each text alone."""
    model.eval().to(device)
    causal = model.config.model_type in CAUSAL
    options = {"use_cache": False} if causal else {}
    rows = packed_rows(make_texts([9, 17, 1, 23, 5, 12]))
    batch = PackedCollator.for_model(model, PAD, LENGTH)(rows)
    batch.pop("labels", None)
    worst = 0.0
    with torch.no_grad():
        logits = model(**{k: v.to(device) for k, v in batch.items()}, **options).logits.cpu()
        assert torch.isfinite(logits).all()
        for index, row in enumerate(rows):
            start = 0
            for length in row["sequence_lengths"].tolist():
                ids = torch.from_numpy(row["input_ids"][start : start + length]).long().unsqueeze(0)
                alone = model(
                    input_ids=ids.to(device), attention_mask=torch.ones_like(ids).to(device), **options
                ).logits.cpu()
                together = logits[index : index + 1, start : start + length]
                difference = token_losses(alone, ids, causal) - token_losses(together, ids, causal)
                worst = max(worst, difference.abs().max().item()) if difference.numel() else worst
                start += length
    return worst


@pytest.mark.parametrize("model_type", packable(patched=False))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_text_has_the_loss_it_has_alone(model_type, attention):
    try:
        model = tiny_model(model_type, attn_implementation=attention)
    except ValueError as error:
        assert "scaled_dot_product_attention" in str(error)  # the architecture has one kind of attention only
        model = tiny_model(model_type, attn_implementation="eager")
    assert worst_difference(model) <= 1e-5


@pytest.mark.parametrize("model_type", sorted({*CAUSAL, *MASKED} - {*packable(patched=False)}))
def test_others_are_refused_by_name(model_type):
    with pytest.raises(UserError, match=f"--pack_sequences: {model_type} "):
        PackedCollator.for_model(tiny_model(model_type), PAD, LENGTH)


def test_falcon_with_alibi_is_refused():
    with pytest.raises(UserError, match="^--pack_sequences: a falcon with alibi does not keep packed texts"):
        PackedCollator.for_model(tiny_model("falcon", alibi=True, new_decoder_architecture=False), PAD, LENGTH)


def test_a_window_shorter_than_the_row_is_refused():
    with pytest.raises(UserError, match="attends to 16 tokens"):
        PackedCollator.for_model(tiny_model("mistral", sliding_window=16), PAD, LENGTH)
    factors = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi = tiny_model("phi3", rope_scaling=factors, original_max_position_embeddings=16)
    with pytest.raises(UserError, match="with longrope, a text of more than 16 tokens"):
        PackedCollator.for_model(phi, PAD, LENGTH)
    assert PackedCollator.for_model(phi, PAD, 16).length == 16


@pytest.mark.parametrize("model_type", EXPERTS)
def test_a_loss_that_balances_routers_is_refused(model_type):
    with pytest.raises(UserError, match=f"routers of {model_type} does not know packed texts"):
        PackedCollator.for_model(tiny_model(model_type, output_router_logits=True), PAD, LENGTH)


def test_a_causal_mask_of_the_fused_kernel_is_refused():
    model = tiny_model("llama")
    model.generation_config.flash_attention_causal_mask = True
    with pytest.raises(UserError, match="--flash_attention_causal_mask"):
        PackedCollator.for_model(model, PAD, LENGTH)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_training_on_packed_rows_is_training_on_the_texts(model_type):
    """Sum of losses and gradients of packed rows against one text at a time, through the installed loss."""
    texts = make_texts([9, 17, 4, 23, 5, 12, 30])
    together, alone = tiny_model(model_type), tiny_model(model_type)
    for model in (together, alone):
        install_token_loss(model, "causal")
    batch = PackedCollator.for_model(together, PAD, LENGTH)(packed_rows(texts))
    output = together(**batch)
    assert output.count.item() == sum(len(text) - 1 for text in texts)
    output.loss.backward()
    total = 0.0
    for text in texts:
        ids = torch.from_numpy(text).long().unsqueeze(0)
        single = alone(input_ids=ids, labels=ids, num_items_in_batch=output.count)
        single.loss.backward()
        total += single.loss_sum.item()
    assert output.loss_sum.item() == pytest.approx(total, rel=1e-5)
    for one, other in zip(together.parameters(), alone.parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm() + 1e-7


def test_bfloat16_models_take_the_mask():
    for attention in ("sdpa", "eager"):
        model = tiny_model("llama", attn_implementation=attention).to(torch.bfloat16)
        batch = PackedCollator.for_model(model, PAD, LENGTH)(packed_rows(make_texts([30, 20, 7])))
        assert torch.isfinite(model(**batch).logits).all()
        single = tiny_model("llama", attn_implementation=attention)
        batch = PackedCollator.for_model(single, PAD, LENGTH)(packed_rows(make_texts([30, 20, 7])))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(single(**batch).logits).all()


lengths_and_capacity = st.integers(2, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), min_size=1, max_size=80), st.just(capacity))
)


@settings(max_examples=100, deadline=None)
@given(lengths_and_capacity)
def test_best_fit(drawn):
    lengths, capacity = np.array(drawn[0]), drawn[1]
    rows = best_fit(lengths, capacity)
    fill = np.bincount(rows, weights=lengths)
    assert fill.min() >= 1 and fill.max() <= capacity
    assert (np.sort(fill)[:2].sum() > capacity) if len(fill) > 1 else True  # no two rows could have been one
    firsts = np.unique(rows, return_index=True)[1]
    assert (np.diff(firsts) > 0).all()


def test_the_effective_batch_is_logged(caplog):
    dataset = Dataset.from_dict({"input_ids": make_texts([LENGTH // 2] * 6)})
    with caplog.at_level("INFO", logger="gaudi_lm"):
        pack_sequences(dataset, LENGTH, rows_per_step=8)
        pack_sequences(dataset, LENGTH, split="validation", rows_per_step=8)
    [line] = [text for text in caplog.messages if "effective batch" in text]
    assert "8 packed rows an optimizer step, about 16 texts" in line and "by 2.0" in line


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, LENGTH), min_size=1, max_size=30).filter(any),
    st.integers(0, 5),
    st.integers(1, 4),
    st.booleans(),
)
def test_packing_loses_and_mixes_nothing(lengths, skipped, pieces, with_labels):
    texts = make_texts([3] * skipped + lengths)
    columns = {"input_ids": texts, "attention_mask": [[1] * len(text) for text in texts]}
    if with_labels:
        columns["labels"] = [np.where(text % 2, text, -100) for text in texts]
    # A sliced table in several chunks: offsets that do not start at 0.
    features = Features(dict.fromkeys(columns, Sequence(Value("int64"))))
    parts = np.array_split(np.arange(len(texts)), pieces)
    chunks = [{name: [column[i] for i in part] for name, column in columns.items()} for part in parts if len(part)]
    table = concatenate_datasets([Dataset.from_dict(chunk, features) for chunk in chunks])
    dataset = table.select(range(skipped, len(texts)))
    packed = pack_sequences(dataset, LENGTH).with_format("numpy")
    wanted = sorted(tuple(text.tolist()) for text in texts[skipped:] if len(text))
    got, labels = [], []
    for index in range(len(packed)):
        row = packed[index]
        assert row["sequence_lengths"].sum() == len(row["input_ids"]) <= LENGTH
        ends = np.cumsum(row["sequence_lengths"])[:-1]
        got += [tuple(piece.tolist()) for piece in np.split(row["input_ids"], ends)]
        labels += [piece.tolist() for piece in np.split(row["labels"], ends)] if with_labels else []
    assert sorted(got) == wanted
    if with_labels:
        assert all(label in (-100, token) for text, row in zip(got, labels, strict=True)
                   for token, label in zip(text, row, strict=True))  # fmt: skip
        assert labels == [[token if token % 2 else -100 for token in text] for text in got]


def test_collated_rows():
    rows = [
        {"input_ids": np.array([5, 6, 7, 8, 9]), "sequence_lengths": np.array([3, 2]), "labels": [5, -100, 7, 8, 9]},
        {"input_ids": np.array([4]), "sequence_lengths": np.array([1])},
    ]
    batch = PackedCollator(length=7, pad_token_id=1, causal=True, first_position=2, pad_position=1)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 1], [4, 1, 1, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[2, 3, 4, 2, 3, 1, 1], [2, 1, 1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100, -100], [-100] * 7]
    assert batch["attention_mask"].shape == (2, 1, 7, 7)
    assert batch["attention_mask"][0, 0].tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
    ]
    for additive in (False, True):
        for causal in (False, True):
            collator = PackedCollator(7, 1, causal, additive=additive)
            assert count_tokens(collator(rows)) == (2, 6, 14)


def test_a_text_longer_than_a_row_is_refused():
    with pytest.raises(UserError, match="--max_seq_length"):
        pack_sequences(Dataset.from_dict({"input_ids": make_texts([5, 41])}), LENGTH)


def test_lines_of_real_text_fill_their_rows():
    texts = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    lines = [" ".join(texts[index : index + 3]) for index in range(0, len(texts), 3)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(lines, vocab_size=2000)
    lengths = np.array([min(512, len(row.ids) + 2) for row in tokenizer.encode_batch(lines)])
    rows = best_fit(lengths, 512)
    assert lengths.mean() < 200
    assert lengths.sum() >= 0.97 * 512 * (rows.max() + 1)


def test_a_hundred_thousand_texts():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.3, 0.8, 100_000).astype(int) + 1, 1, 512)
    rows = best_fit(lengths, 512)
    assert np.bincount(rows, weights=lengths).max() <= 512
    assert lengths.sum() >= 0.97 * 512 * (rows.max() + 1)

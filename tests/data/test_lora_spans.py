"""Exactly what is trained, for every style of prompt: tables of expected tokens, written by hand.

Tokens are words here, so that the tables can be read: an untrained word stands as it is, a trained one between stars.
"""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenised import LORA, tokenised
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gaudi_lm.data.instructions import (
    collate_examples,
    finish_rows,
    show_targets,
)
from gaudi_lm.data.packing import PackedCollator, pack_sequences
from gaudi_lm.data.prompts import ExampleFormat, check_tokenizer, find_format, log_formats
from gaudi_lm.errors import UserError

CHAT = "<bos> {% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {{ eos_token }} {% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(pad: str | None = None) -> PreTrainedTokenizerFast:
    """Words at spaces, a start before each text; the padding token is the EOS where `pad` says so."""
    words = {"<bos>": 0, "<eos>": 1, "<pad>": 2, "<unk>": 3}
    text = " ".join([LORA.WITH_INPUT, LORA.WITHOUT_INPUT, LORA.SQL, "<user> <assistant> <system> a b c d e f g h"])
    for part in ("{instruction}", "{input}"):
        text = text.replace(part, " ")
    for word in text.split():
        words.setdefault(word, len(words))
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token=pad,
        chat_template=CHAT,
    )  # fmt: skip


def words(tokenizer, input_ids, labels) -> str:
    """Tokens as words, the trained ones between stars."""
    marked = []
    for word, label in zip(tokenizer.convert_ids_to_tokens(list(map(int, input_ids))), labels, strict=True):
        marked.append(f"*{word}*" if label != -100 else word)
    return " ".join(marked)


def spans(tokenizer, examples: list[dict], max_length: int = 200, inputs: bool = False, **flags) -> list[str]:
    """The rows of `tokenise_examples` as words."""
    concatenate = flags.pop("concatenate", False)
    rows = tokenised(tokenizer, examples, max_length, flags, train_on_inputs=inputs, concatenate=concatenate)
    return [words(tokenizer, row["input_ids"], row["labels"]) for row in rows.with_format("numpy")]


ALPACA = [
    {"instruction": "a b", "input": "", "output": "c d"},
    {"instruction": "a", "input": "e f", "output": "g"},
    {"instruction": "b", "input": None, "output": ""},
]
START = (
    "<bos> Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
START_INPUT = (
    "<bos> Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
EXPECTED = [
    f"{START} ### Instruction: a b ### Response: *c* *d* *<eos>*",
    f"{START_INPUT} ### Instruction: a ### Input: e f ### Response: *g* *<eos>*",
    f"{START} ### Instruction: b ### Response: *<eos>*",
]


@pytest.mark.parametrize("pad", [None, "<eos>", "<pad>"])
def test_instruction(pad):
    tokenizer = make_tokenizer(pad)
    assert spans(tokenizer, ALPACA) == EXPECTED
    everything = [" ".join(f"*{word.strip('*')}*" for word in row.split()) for row in EXPECTED]
    assert spans(tokenizer, ALPACA, inputs=True) == everything
    renamed = [{"q": "a b", "more": "", "reply": "c d"}]
    assert spans(tokenizer, renamed, instruction="q", input="more", output="reply") == EXPECTED[:1]
    assert spans(tokenizer, [{"q": "a b", "output": "c d"}], instruction="q") == EXPECTED[:1]


@pytest.mark.parametrize("pad", [None, "<eos>", "<pad>"])
def test_padded(pad):
    """The EOS is learnt, and padding is not, also where they are one token."""
    tokenizer = make_tokenizer(pad)
    rows = tokenised(tokenizer, ALPACA, 200).with_format("numpy")
    padding = tokenizer.pad_token_id if pad else tokenizer.eos_token_id
    batch = collate_examples(list(rows), padding, lengths=[40])
    filler = tokenizer.convert_ids_to_tokens(padding)
    for index, row in enumerate(EXPECTED):
        used = len(row.split())
        shown = words(tokenizer, batch["input_ids"][index], batch["labels"][index])
        assert shown == " ".join([row, *[filler] * (40 - used)])
        assert batch["attention_mask"][index].tolist() == [1] * used + [0] * (40 - used)
    longest = collate_examples(list(rows), padding, lengths=[])
    assert longest["input_ids"].shape[1] == max(len(row.split()) for row in EXPECTED)
    assert longest["attention_mask"].sum(1).tolist() == [len(row.split()) for row in EXPECTED]
    # Where all is learnt, the first token still is no target: nothing predicts it.
    whole = collate_examples([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2, padding, lengths=[])
    assert whole["labels"].tolist() == [[-100, 6, 7]] * 2 and "attention_mask" not in whole
    whole = collate_examples([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}], padding, lengths=[3])
    assert whole["attention_mask"].tolist() == [[1, 1, 1]], "batches of chosen lengths have the same inputs"


def test_rows_that_are_padded_already():
    """As a tokenizer with `padding="max_length"` makes them; labels are their tokens, where they have none."""
    rows = [
        {"input_ids": [5, 6, 7, 8, 0], "attention_mask": [1, 1, 1, 1, 0]},
        {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1]},
    ]
    for more in ({}, {"labels": [-100, 1, 2, 3, 4]}):
        batch = collate_examples([{**row, **more} for row in rows], 0, lengths=[])
        assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 7, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
        wanted = [[-100, 1, 2, 3], [-100, 3, 4, -100]] if more else [[-100, 6, 7, 8], [-100, 6, 7, -100]]
        assert batch["labels"].tolist() == wanted


@pytest.mark.parametrize("made", [None, "text", ("a", 7), ("a",), ("a", "b", "c"), {"prompt": "a"}])
def test_what_a_format_example_of_ones_own_makes_is_two_texts(made):
    with pytest.raises(UserError, match="^format_example makes two texts of an example, prompt and response, not "):
        tokenised(make_tokenizer(), ALPACA, 200, format_example=lambda row: made)


def test_concatenated():
    tokenizer = make_tokenizer()
    joined = " ".join(EXPECTED).split()
    blocks = spans(tokenizer, ALPACA, max_length=16, concatenate=True)
    assert blocks == [" ".join(joined[start : start + 16]) for start in range(0, len(joined) // 16 * 16, 16)]
    assert len(blocks) == 5


def test_packed():
    tokenizer = make_tokenizer("<eos>")
    rows = tokenised(tokenizer, ALPACA, 64)
    packed = pack_sequences(rows, 64).with_format("numpy")
    batch = PackedCollator(length=64, pad_token_id=1, causal=True)(list(packed))
    found = [words(tokenizer, *row) for row in zip(batch["input_ids"], batch["labels"], strict=True)]
    assert sorted(" ".join(found).replace(" <bos>", "\n<bos>").split("\n")) == sorted(
        row + " <eos>" * fill for row, fill in zip(*_with_filling(packed, EXPECTED), strict=True)
    )


def _with_filling(packed, rows: list[str]) -> tuple[list[str], list[int]]:
    """The rows, and how much padding follows each: behind the last text of each packed row."""
    lengths = {len(row.split()): row for row in rows}
    order, filling = [], []
    for row in packed:
        order += [lengths[length] for length in row["sequence_lengths"].tolist()]
        filling += [0] * (len(row["sequence_lengths"]) - 1) + [64 - int(row["sequence_lengths"].sum())]
    return order, filling


def test_shortened(caplog):
    """The EOS has its place; what is cut is counted; an answer that is gone takes its example along."""
    tokenizer = make_tokenizer()
    prompt = len(EXPECTED[0].split()) - 3
    with caplog.at_level("INFO", logger="gaudi_lm"):
        assert spans(tokenizer, ALPACA[:1], max_length=prompt + 2) == [EXPECTED[0].replace(" *d*", "")]
    assert "1 examples; 1 truncated" in caplog.text and "0 left out" in caplog.text
    with caplog.at_level("INFO", logger="gaudi_lm"):
        assert spans(tokenizer, ALPACA, max_length=prompt + 2) == [EXPECTED[0].replace(" *d*", ""), EXPECTED[2]]
    assert "1 left out" in caplog.text
    for inputs in (False, True):
        with pytest.raises(UserError, match="none of the 1 train examples has an answer within --max_seq_length 20"):
            spans(tokenizer, ALPACA[:1], max_length=20, inputs=inputs)


def test_sql():
    row = {"question": "a b", "context": "c d e", "answer": "f g"}
    start = (
        "<bos> Answer the question about a database with one SQL query. The context holds the statements that made "
        "its tables."
    )
    expected = f"{start} ### Question: a b ### Context: c d e ### SQL: *f* *g* *<eos>*"
    assert spans(make_tokenizer(), [row], sql_prompt=True) == [expected]
    alpaca = {"instruction": "a b", "input": "c d e", "output": "f g"}
    assert spans(make_tokenizer(), [alpaca], sql_prompt=True) == [expected]


def test_chat():
    """One answer by --chat_prompt, and conversations: every answer of the assistant with its EOS, nothing else."""
    tokenizer = make_tokenizer()
    one = "<bos> <user> a b <eos> <assistant> *c* *d* *<eos>*"
    assert spans(tokenizer, ALPACA[:1], chat_prompt=True) == [one]
    asked = {"role": "user", "content": "a"}
    conversation = [
        {"role": "system", "content": "h"}, asked, {"role": "assistant", "content": "b c"},
        {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}, {"role": "user", "content": "f"},
    ]  # fmt: skip
    long = "<bos> <system> h <eos> <user> a <eos> <assistant> *b* *c* *<eos>* <user> d <eos> <assistant> *e* *<eos>*"
    rows = [{"messages": conversation}, {"messages": [asked]}, {"messages": conversation[1:3]}]
    short = "<bos> <user> a <eos> <assistant> *b* *c* *<eos>*"
    assert spans(tokenizer, rows) == [long, short]
    assert spans(tokenizer, rows, inputs=True)[1] == " ".join(f"*{word.strip('*')}*" for word in short.split())
    # Cut in the question after an answer: behind that answer. Cut in an answer: it ends there.
    assert spans(tokenizer, rows, max_length=12) == [" ".join(long.split()[:11]), short]
    assert spans(tokenizer, rows, max_length=10) == [" ".join(long.split()[:9]) + " *<eos>*", short]
    assert spans(tokenizer, rows, max_length=16) == [" ".join(long.split()[:11]), short]
    assert spans(tokenizer, rows, max_length=17) == [long, short]
    # A template without an EOS still gets one at the end.
    tokenizer.chat_template = CHAT.replace("{{ eos_token }}", "")
    assert spans(tokenizer, rows)[1] == "<bos> <user> a <assistant> *b* *c* *<eos>*"


def test_text():
    assert spans(make_tokenizer(), [{"text": "a b"}, {"text": "c"}], inputs=True) == [
        "*<bos>* *a* *b* *<eos>*",
        "*<bos>* *c* *<eos>*",
    ]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_column_for_the_system(column, caplog):
    """With --chat_prompt it is a message of its own; Alpaca's prompt has no place for it, which the log says."""
    rows = [{**ALPACA[0], column: "h"}, {**ALPACA[0], column: " "}, {**ALPACA[0], column: None}]
    one = "<bos> <user> a b <eos> <assistant> *c* *d* *<eos>*"
    found = spans(make_tokenizer(), rows, chat_prompt=True)
    assert found == [one.replace("<bos>", "<bos> <system> h <eos>"), one, one] and not caplog.records
    assert spans(make_tokenizer(), rows) == spans(make_tokenizer(), ALPACA[:1] * 3)
    log_formats(find_format(Dataset.from_list(rows)) for _ in range(2))
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert said == f"column '{column}' is left out: only --chat_prompt has a place for it"
    with pytest.raises(UserError, match=f"column {column}, row 1: a list, not text"):
        spans(make_tokenizer(), [{**ALPACA[0], column: ["h"]}], chat_prompt=True)


def test_blank_texts_are_left_out():
    rows = [{"text": ""}, {"text": "a"}, {"text": "  "}]
    assert spans(make_tokenizer(), rows, inputs=True) == ["*<bos>* *a* *<eos>*"]


def test_a_start_and_an_end_that_are_there_already():
    """Data that were formatted for a model have them in the text."""
    tokenizer = make_tokenizer()
    assert spans(tokenizer, [{"text": "<bos> a b <eos>"}], inputs=True) == ["*<bos>* *a* *b* *<eos>*"]
    (row,) = spans(tokenizer, [{"instruction": "a", "input": "", "output": "b <eos>"}])
    assert row.endswith(" *b* *<eos>*") and row.startswith("<bos> ")


def test_shown_example():
    tokenizer = make_tokenizer()
    row = {"input_ids": [0, 5, 6, 1], "labels": [-100, -100, 6, 1]}
    assert show_targets(row, tokenizer) == f"<bos> {tokenizer.decode([5])}>>>{tokenizer.decode([6])} <eos><<<"


def test_formats():
    def columns(*names, **flags):
        return find_format(Dataset.from_dict({name: ["a"] for name in names}), **flags).style

    assert columns("instruction", "input", "output", "text") == "instruction"
    assert columns("text", "id") == columns("text", "instruction") == columns("text", "output") == "text"
    assert columns("words", text_column="words") == "text"
    assert columns("messages", "question", "context", "answer", sql_prompt=True) == "sql"
    assert find_format(Dataset.from_dict({"dialog": [["a"]], "text": ["a"]})).style == "text"
    assert columns("messages", "text") == "messages", "whatever the first of them looks like"
    for part in ("instruction", "input", "output"):
        assert columns("instruction", "input", "output", "messages", **{part: part}) == "instruction"
    assert columns("instruction", "output", chat_prompt=True) == "chat"
    assert columns("question", "context", "answer", sql_prompt=True) == "sql"
    for names, flags, message in [
        (["a", "b"], {}, "no columns instruction and output"),
        (["instruction", "b"], {"instruction": "instruction"}, "--output_column_name output"),
        (["question", "answer"], {"sql_prompt": True}, "--input_column_name context"),
        (["a", "text"], {"chat_prompt": True}, "--instruction_column_name instruction"),
        (["text"], {"text_column": "words"}, "--text_column_name words"),
        (["text", "q"], {"text_column": "text", "instruction": "q"}, "--text_column_name excludes"),
        (["text"], {"text_column": "text", "chat_prompt": True}, "--text_column_name excludes"),
        (["text"], {"text_column": "text", "sql_prompt": True}, "--text_column_name excludes"),
    ]:
        with pytest.raises(UserError, match=message):
            columns(*names, **flags)
    with pytest.raises(UserError, match="no columns instruction and output"):
        find_format(Dataset.from_dict({"prompt": [[{"role": "user", "content": "a"}]]}))
    assert columns("instruction", "context", "response", "category") == "instruction"
    for names in (["prompt", "completion"], ["prompt", "response"], ["question", "answer"], ["query", "response"]):
        example_format = find_format(Dataset.from_dict({name: ["a"] for name in [*names, "text", "id"]}))
        assert example_format.columns == {"instruction": names[0], "output": names[1]}
        assert str(example_format) == f"instruction (instruction from {names[0]!r}, output from {names[1]!r})"
    assert find_format(Dataset.from_dict({"instruction": [1], "output": ["a"]})).style == "instruction"
    for value, kind in (["a"], "list"), ({"a": 1}, "dict"), (b"a", "bytes"):
        with pytest.raises(UserError, match=f"--output_column_name output, row 2: a {kind}, not text"):
            find_format(Dataset.from_dict({"instruction": ["a", "b"], "output": [None, value]}))


def test_answers_need_a_token_that_ends_them():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="the tokenizer has no end-of-sequence token"):
        check_tokenizer(ExampleFormat("text", {"text": "text"}), tokenizer, train_on_inputs=True)


@given(data=st.data(), limit=st.none() | st.integers(2, 8), inputs=st.booleans())
def test_finish_rows_against_lists(data, limit, inputs):
    pair = st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.lists(st.integers(0, 9), max_size=5))
    rows = data.draw(st.lists(pair, min_size=1, max_size=5))
    flat = np.array([token for a, b in rows for token in [*(~t for t in a), *b]], np.int32)
    tokens, lengths = finish_rows(flat, np.array([len(a) + len(b) for a, b in rows]), 1, limit, inputs)
    expected = []
    for a, b in rows:
        body = [*(t if inputs else ~t for t in a), *b]
        room = len(body) if limit is None else limit - 1
        gone = len(body) > room <= len(a)
        expected.append([] if gone else [*body[:room], 1])
    assert lengths.tolist() == [len(row) for row in expected]
    assert tokens.tolist() == [token for row in expected for token in row]


def test_a_row_that_is_cut_where_an_answer_begins_ends_with_the_one_before():
    rows = np.array([~2, 3, ~4, 5, 6], np.int32)
    for length, expected in ((3, [~2, 3]), (4, [~2, 3]), (5, [~2, 3, ~4, 5, 1]), (6, [~2, 3, ~4, 5, 6, 1])):
        tokens, lengths = finish_rows(rows, np.array([5]), 1, length, False)
        assert tokens.tolist() == expected and lengths.tolist() == [len(expected)]

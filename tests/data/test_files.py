"""Files as people bring them: odd names, columns that come late or differ, numbers, delimiters, very long lines."""

import datetime
import decimal
import gzip
import hashlib
import json
import logging
import os
import re

import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Json, load_from_disk
from running import run_several
from torch._utils import ExceptionWrapper
from transformers import AutoTokenizer, LlamaTokenizerFast

from gaudi_lm.arguments.definitions import DataArguments, ModelArguments
from gaudi_lm.data import json_lines, tokenization
from gaudi_lm.data.blocks import tokenise
from gaudi_lm.data.columns import batches_of_text, text_column, texts_of, values_of
from gaudi_lm.data.completions import encode_with_offsets
from gaudi_lm.data.loading import load_raw
from gaudi_lm.data.readers import FileSet, read_files
from gaudi_lm.errors import UserError

WORDS = ["Assert statements are a convenient way", "to insert debugging assertions", "into a program"]


def read(folder, streaming: bool = False, validation: bool = False, **flags) -> dict:
    data = DataArguments(streaming=streaming, **{name: str(value) for name, value in flags.items()})
    return load_raw(data, ModelArguments(cache_dir=str(folder / "cache")), "train_file" in flags, validation)


def train_texts(folder, streaming: bool = False, column: str | None = None, **flags) -> list[str]:
    """The texts that a script would train on, read from a dataset or a stream."""
    train = read(folder, streaming, **flags)["train"]
    column = text_column(train, column)
    if streaming:
        return [text for batch in batches_of_text(train, column) for text in batch]
    return texts_of(train.with_format("arrow")[:], column)


def write_jsonl(path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


both_ways = pytest.mark.parametrize("streaming", (False, True), ids=("whole", "stream"))

NAMES = [
    "notes[1].txt", "notes?.txt", "a*b.txt", "100%.txt", "with space.txt", "a::b.txt", "#1.txt", "{x}.txt",
    "naïve.TXT", "-dash.txt", "[!a].txt", "line\nbreak.txt", "a~b.txt", "c:d.txt",
]  # fmt: skip


@both_ways
@pytest.mark.parametrize("name", NAMES)
def test_an_existing_path_is_a_path(tmp_path, name, streaming):
    (tmp_path / name).write_text("\n".join(WORDS) + "\n")
    (tmp_path / "notes1.txt").write_text("another file\n")
    assert train_texts(tmp_path, streaming, train_file=tmp_path / name) == [f"{line}\n" for line in WORDS]


@both_ways
def test_a_glob_is_one_where_there_is_no_such_file(tmp_path, streaming):
    for number in (1, 2, 3):
        (tmp_path / f"notes{number}.txt").write_text(f"file {number}\n")
    assert train_texts(tmp_path, streaming, train_file=tmp_path / "notes[12].txt") == ["file 1\n", "file 2\n"]


@both_ways
def test_splits_are_read_by_themselves(tmp_path, streaming):
    """Other columns in the validation file, and even another kind of file."""
    train = write_jsonl(tmp_path / "train.jsonl", [{"text": line, "score": 1} for line in WORDS])
    rows = [{"source": "manual", "text": line, "score": "high"} for line in WORDS]
    validations = [write_jsonl(tmp_path / "validation.jsonl", rows), tmp_path / "validation.csv"]
    pandas.DataFrame(rows).to_csv(validations[1], index=False)
    for validation in validations:
        raw = read(tmp_path, streaming, True, train_file=train, validation_file=validation)
        for split in ("train", "validation"):
            assert text_column(raw[split], None) == "text"
            assert [row["text"] for row in raw[split]] == WORDS


@both_ways
@pytest.mark.parametrize("late", ({"extra": 1}, {"extra": {"a": [1]}}, {"id": "a word"}, {"id": [1]}, {"id": None}))
def test_only_columns_that_are_used_need_to_fit(tmp_path, streaming, late):
    """Files of one split with other columns, or with other types in a column that nobody reads."""
    write_jsonl(tmp_path / "part0.jsonl", [{"id": 1, "text": WORDS[0]}])
    write_jsonl(tmp_path / "part1.jsonl", [{"text": WORDS[1], **late}])
    write_jsonl(tmp_path / "part2.jsonl", [{"text": WORDS[2], "id": 2.5}])
    assert train_texts(tmp_path, streaming, train_file=tmp_path / "part*.jsonl") == WORDS


@both_ways
@pytest.mark.parametrize("late", ("extra", "text", "id"))
def test_a_key_that_comes_late(tmp_path, streaming, late, monkeypatch):
    """After the first block, which is 8 MB, an unused column, the used one, or another type of a column appears."""
    monkeypatch.setattr(json_lines, "BLOCK", 200)
    rows = [{"id": number, "text": WORDS[number % 3]} for number in range(200)]
    if late == "text":
        rows[0]["text"] = "first"
        rows[1:150] = [{"id": number} for number in range(1, 150)]
    else:
        rows[150][late] = "a word" if late == "id" else {"deep": ["er"]}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert train_texts(tmp_path, streaming, train_file=path) == [row.get("text", "") for row in rows]


@pytest.mark.slow
def test_a_key_after_ten_megabytes(tmp_path):
    rows = [{"text": f"{number} " + "word " * 100, "number": number} for number in range(24_000)]
    rows[-1]["late"] = "a key"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert path.stat().st_size > 12 * 2**20
    train = read(tmp_path, train_file=path)["train"]
    assert train.column_names == ["text", "number", "late"]
    assert train[-1] == rows[-1] and train[0] == {**rows[0], "late": None}


VALUES = [85, -1, 2.5, True, None, "a word", "2020-01-01", 2**70]
SPELT = ["85", "-1", "2.5", "true", "", "a word", "2020-01-01", str(2**70)]


@both_ways
def test_numbers_are_written_out(tmp_path, streaming):
    """Numbers among texts, and columns of numbers alone; text that looks like a date or a number stays as it is."""
    path = write_jsonl(tmp_path / "mixed.jsonl", [{"text": value} for value in VALUES])
    assert train_texts(tmp_path, streaming, train_file=path) == SPELT
    for name, values, expected in (
        ("whole", [1, 0, None], ["1", "0", ""]),
        ("booleans", [True, False], ["true", "false"]),
        ("dates", ["2020-01-01", "2021-01-01"], ["2020-01-01", "2021-01-01"]),
        ("fractions", [0.5, 1.0], ["0.5", "1.0"]),
        ("nothing", [None, None], ["", ""]),
    ):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": value} for value in values])
        assert train_texts(tmp_path, streaming, train_file=path) == expected, name
    (tmp_path / "as_written.csv").write_text("text\n007\n1.50\nNA\nnull\n\nTrue\n")
    texts = train_texts(tmp_path, streaming, train_file=tmp_path / "as_written.csv")
    assert texts == ["007", "1.50", "NA", "null", "True"]


@both_ways
@pytest.mark.parametrize("value", (["a"], {"a": 1}))
def test_lists_and_objects_are_refused_by_row(tmp_path, streaming, value):
    path = write_jsonl(tmp_path / "mixed.jsonl", [{"text": "a"}, {"text": 1}, {"text": value}])
    with pytest.raises(UserError, match=f"'text', row 3: (a )?{type(value).__name__}, not text"):
        train_texts(tmp_path, streaming, train_file=path)
    path = write_jsonl(tmp_path / "all.jsonl", [{"text": value}])
    with pytest.raises(UserError, match=f"'text', row 1: (a )?{type(value).__name__}, not text"):
        train_texts(tmp_path, streaming, train_file=path)


@both_ways
def test_the_column_by_default(tmp_path, streaming):
    """`text`, or else the first one with words: a number of the row is not what anybody trains on."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": n, "content": line} for n, line in enumerate(WORDS)])
    assert train_texts(tmp_path, streaming, train_file=path) == WORDS
    (tmp_path / "a.csv").write_text("id,content\n" + "".join(f"{n},{line}\n" for n, line in enumerate(WORDS)))
    assert train_texts(tmp_path, streaming, train_file=tmp_path / "a.csv") == WORDS
    assert train_texts(tmp_path, streaming, "id", train_file=path) == ["0", "1", "2"]
    path = write_jsonl(tmp_path / "late.jsonl", [{"id": "1", "content": text} for text in ("", "7", "words")])
    assert train_texts(tmp_path, streaming, train_file=path) == ["", "7", "words"]
    path = write_jsonl(tmp_path / "numbers.jsonl", [{"a": 1, "b": 2}])
    with pytest.raises(UserError, match="the dataset has no columns, or no rows"):
        text_column(IterableDataset.from_generator(lambda: iter(())) if streaming else Dataset.from_dict({}), None)
    with pytest.raises(UserError, match="none of a, b holds words; --text_column_name takes one of a, b"):
        train_texts(tmp_path, streaming, train_file=path)


@both_ways
@pytest.mark.parametrize(
    ("name", "delimiter", "flags"),
    [
        ("tabs.tsv", "\t", {}),
        ("tabs.tsv.gz", "\t", {}),
        ("tabs.csv", "\t", {}),
        ("semicolons.csv", ";", {}),
        ("semicolons.csv", ";", {"csv_delimiter": ";"}),
        ("commas.tsv", ",", {"csv_delimiter": ","}),
        ("bars.csv", "|", {"csv_delimiter": "|"}),
        ("tabs.csv", "\t", {"csv_delimiter": "\\t"}),
    ],
)
def test_delimiters(tmp_path, streaming, name, delimiter, flags):
    texts = [*WORDS, 'with "quotes"', f"with the delimiter {delimiter} in it", "over\ntwo lines"]
    rows = pandas.DataFrame({"id": range(len(texts)), "text": texts})
    rows.to_csv(tmp_path / name, sep=delimiter, index=False)
    assert train_texts(tmp_path, streaming, train_file=tmp_path / name, **flags) == texts


@both_ways
@pytest.mark.parametrize("mark", ("", "\ufeff"))
@pytest.mark.parametrize("end", ("\n", "\r\n"))
def test_the_line_by_which_excel_tells_the_delimiter(tmp_path, streaming, mark, end):
    lines = ["sep=|", "id|text, with commas", *(f"{number}|{text}" for number, text in enumerate(WORDS))]
    (tmp_path / "a.csv").write_bytes((mark + end.join(lines) + end).encode())
    flags = {"train_file": tmp_path / "a.csv", "text_column_name": "text, with commas"}
    for more in ({}, {"csv_delimiter": "|"}):
        assert train_texts(tmp_path, streaming, **flags, **more) == WORDS


@both_ways
@pytest.mark.parametrize("mark", ("", "\ufeff"))
@pytest.mark.parametrize("name", ("of whom, when", 'a ""b"", c', "over, two\nlines"))
def test_a_delimiter_within_a_name_is_none(tmp_path, streaming, name, mark):
    for number, head in enumerate((f'"{name}";text;source', f'id;"{name}";text', "id;text;source (book, page)")):
        content = head + "".join(f"\n{number};{line};{line}" for line in WORDS)
        (tmp_path / f"{number}.csv").write_text(mark + content + "\n")
        assert train_texts(tmp_path, streaming, train_file=tmp_path / f"{number}.csv") == WORDS, head


def test_wrong_delimiters_and_rows(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,a\n2,b,c\n")
    (tmp_path / "b.csv").write_text("text\n1,a\n2,b\n")
    (tmp_path / "a.txt").write_text("a\n")
    for flags, message in (
        ({"train_file": tmp_path / "a.csv", "csv_delimiter": "::"}, "--csv_delimiter '::': one character"),
        (
            {"train_file": tmp_path / "a.txt", "csv_delimiter": ";"},
            "--csv_delimiter: --train_file .*a.txt is not a csv",
        ),
        ({"train_file": tmp_path / "a.csv"}, "a.csv: cannot be read as csv .*line 3"),
        ({"train_file": tmp_path / "b.csv"}, "b.csv: cannot be read as csv"),
    ):
        for streaming in (False, True):
            with pytest.raises(UserError, match=message):
                train_texts(tmp_path, streaming, **flags)


@both_ways
def test_types_of_parquet(tmp_path, streaming):
    """string_view, dictionaries, large strings; a column that datasets has no type for is no obstacle."""
    number = pa.array([1, 2, 3])
    for name, column in {
        "view": pa.array(WORDS, pa.string_view()),
        "dictionary": pa.array(WORDS).dictionary_encode(),
        "large": pa.array(WORDS, pa.large_string()),
    }.items():
        more = {
            "tags": pa.array([["a"], ["b"], None], pa.list_(pa.string_view())),
            "views": pa.array([["a"], ["b"], None], pa.list_view(pa.string())),
            "struct": pa.array([{"a": b"x"}, {"a": None}, None], pa.struct([("a", pa.binary_view())])),
            "map": pa.array([[("a", 1)]] * 3, pa.map_("string", "int8")),
        }
        table = pa.table({"n": number, "text": column, **more})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        assert train_texts(tmp_path, streaming, train_file=tmp_path / f"{name}.parquet") == WORDS
    assert train_texts(tmp_path, streaming, train_file=tmp_path / "*.parquet") == 3 * WORDS
    if not streaming:
        features = read(tmp_path, train_file=tmp_path / "large.parquet")["train"].features
        assert features["n"].dtype == str(number.type) and features["tags"].feature.dtype == "string"


DAY = datetime.date(2026, 1, 31)


@both_ways
@pytest.mark.parametrize("value", [DAY, decimal.Decimal("1.50"), [DAY], {"a": [DAY, None]}, b"\xff", {"a": b"\xff"}])
def test_columns_whose_type_differs_between_parquet_files(tmp_path, streaming, value):
    """As a column of dates that another file has as text: who does not read it need not mind."""
    for name, own in {"a": pa.array([value]), "b": pa.array(["word"])}.items():
        pyarrow.parquet.write_table(pa.table({"text": [name], "more": own}), tmp_path / f"{name}.parquet")
    assert train_texts(tmp_path, streaming, train_file=tmp_path / "*.parquet") == ["a", "b"]
    if isinstance(value, (datetime.date, decimal.Decimal)):
        assert train_texts(tmp_path, streaming, "more", train_file=tmp_path / "*.parquet") == [str(value), "word"]
    else:
        with pytest.raises(UserError, match="column 'more', row 1: .*, not text"):
            train_texts(tmp_path, streaming, "more", train_file=tmp_path / "*.parquet")


@both_ways
def test_a_parquet_file_of_json(tmp_path, streaming):
    """As `datasets` writes a column of several kinds of values."""
    values = [*WORDS, 5, 1.36, None]
    path = tmp_path / "a.parquet"
    Dataset.from_dict({"text": values}, features=Features({"text": Json()})).to_parquet(path)
    assert pyarrow.parquet.read_schema(path).field("text").type == pa.json_()
    assert train_texts(tmp_path, streaming, train_file=path) == [*WORDS, "5", "1.36", ""]


@both_ways
def test_a_key_that_is_null_is_there(tmp_path, streaming):
    """For one's own code, which reads the objects of a parquet file alike in a stream."""
    more = [{"source": "web", "n": 1}, {"source": None, "n": 2}]
    pyarrow.parquet.write_table(pa.table({"text": WORDS[:2], "more": more}), tmp_path / "a.parquet")
    train = read(tmp_path, streaming, train_file=tmp_path / "a.parquet")["train"]
    assert [row["more"] for row in train] == more


@both_ways
@pytest.mark.parametrize("ending", ("txt", "csv", "jsonl", "json"))
def test_a_byte_order_mark_is_not_text(tmp_path, streaming, ending):
    rows = [{"text": line} for line in WORDS]
    content = {
        "txt": "\n".join(WORDS),
        "csv": "text\n" + "\n".join(WORDS),
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows, indent=1),
    }[ending]
    (tmp_path / f"a.{ending}").write_bytes(b"\xef\xbb\xbf" + content.encode())
    texts = train_texts(tmp_path, streaming, train_file=tmp_path / f"a.{ending}")
    assert [text.rstrip("\n") for text in texts] == WORDS


@both_ways
def test_json_of_one_value(tmp_path, streaming):
    rows = [{"text": line} for line in WORDS]
    for name, value in {"list": rows, "texts": WORDS, "object": {"version": "1", "data": rows}}.items():
        for indent in (None, 2):
            (tmp_path / f"{name}{indent}.json").write_text(json.dumps(value, indent=indent))
            path = tmp_path / f"{name}{indent}.json"
            assert train_texts(tmp_path, streaming, train_file=path) == WORDS, (name, indent)
    (tmp_path / "number.json").write_text(json.dumps([*rows, 5]))
    with pytest.raises(UserError, match="number.json, row 4: a int, not an object"):
        train_texts(tmp_path, streaming, train_file=tmp_path / "number.json")


def test_json_of_one_row(tmp_path):
    """Its lists of objects are a part of it, not rows."""
    messages = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "I"}]
    for row in (
        {"messages": messages},
        {"text": "words", "marks": [{"start": 1}]},
        {"number": 1, "left": [{"a": 1}], "right": [{"b": 2}]},
    ):
        for indent in (None, 2):
            path = tmp_path / f"{len(row)}{indent}.json"
            path.write_text(json.dumps(row, indent=indent))
            (block,) = json_lines.json_blocks(str(path))
            assert json_lines.parse_lines(*block) == [row]


@both_ways
def test_a_folder_is_read_like_files(tmp_path, streaming):
    """`--dataset_name FOLDER`: its splits need not have the same columns, nor the parts of one the same types."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", [{"text": line, "n": 1} for line in WORDS])
    write_jsonl(folder / "train-1.jsonl", [{"text": line, "n": "one"} for line in WORDS])
    write_jsonl(folder / "validation.jsonl", [{"source": "manual", "text": line} for line in WORDS])
    write_jsonl(folder / "test.jsonl", [{"other": 1}])
    raw = read(tmp_path, streaming, True, train_file="", dataset_name=folder)
    assert {split: [row["text"] for row in rows] for split, rows in raw.items()} == {
        "train": 2 * WORDS,
        "validation": WORDS,
    }
    assert text_column(raw["train"], None) == "text"


def test_a_stream_that_cannot_be_read_on():
    def rows():
        yield {"text": "a"}
        raise pa.ArrowInvalid("Couldn't cast\ntext: int64")

    stream = IterableDataset.from_generator(rows)
    with pytest.raises(UserError, match="cannot be read on after row 1 .*Couldn't cast text: int64"):
        list(batches_of_text(stream, "text", 1))
    with pytest.raises(UserError, match="the stream cannot be read .Couldn't cast text: int64"):
        text_column(stream, None)


@both_ways
def test_half_characters(tmp_path, streaming):
    """What programs leave that cut a text within an emoji; pairs are whole."""
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert train_texts(tmp_path, streaming, train_file=tmp_path / "a.jsonl") == ["cut \ufffd", "whole \U0001f600"]


def test_many_frames_of_zstandard(tmp_path):
    """As programs that compress in parallel write them."""
    import zstandard

    frames = [zstandard.compress(f"{line}\n".encode()) for line in WORDS]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert train_texts(tmp_path, train_file=tmp_path / "a.txt.zst") == [f"{line}\n" for line in WORDS]


def test_a_file_is_read_again_when_it_has_changed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first\n")
    assert train_texts(tmp_path, train_file=path) == ["first\n"]
    files = sorted((tmp_path / "cache").rglob("*.arrow"))
    assert train_texts(tmp_path, train_file=path) == ["first\n"]
    assert sorted((tmp_path / "cache").rglob("*.arrow")) == files
    path.write_text("other\n")
    assert train_texts(tmp_path, train_file=path) == ["other\n"]
    before = path.stat()
    path.write_text("third\n")  # as `cp -p` and `rsync -t` do
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert train_texts(tmp_path, train_file=path) == ["third\n"]
    path.write_text("other\n")
    data = DataArguments(train_file=str(path), keep_linebreaks=False)
    assert load_raw(data, ModelArguments(cache_dir=str(tmp_path / "cache")), True, False)["train"]["text"][:] == [
        "other"
    ]


@pytest.fixture(params=("bytes", "metaspace", "masked"))
def tokenizer(request, assets, instructions, masked_assets):
    folder = {"bytes": assets.tokenizer, "metaspace": instructions.llama, "masked": masked_assets.bert}
    return AutoTokenizer.from_pretrained(folder[request.param])


@pytest.mark.parametrize("special", (False, True))
def test_a_long_text_is_cut_between_words(assets, tokenizer, special, monkeypatch):
    """The tokens of the pieces are those of the whole text, with the special tokens at its two ends."""
    monkeypatch.setattr(tokenization, "PIECE", 500)
    monkeypatch.setattr(tokenization, "WINDOW", 250)
    monkeypatch.setattr(tokenization, "CHARACTERS", 2000)
    text = " " + assets.train.read_text()[:20_000]
    texts = ["before", text, "", "after", text[:700], "x" * 499, *(["and", "more"] * 300)]
    tokens, lengths = tokenization.encode(tokenizer, texts, special)
    expected = [tokenizer(one, add_special_tokens=special)["input_ids"] for one in texts]
    assert lengths.tolist() == list(map(len, expected))
    assert tokens.tolist() == sum(expected, [])
    assert isinstance(tokenizer, LlamaTokenizerFast) or tokenizer.is_fast


def test_what_a_tokenizer_file_cuts_or_fills_stays_whole(tokenizer):
    text = "one two three four five six seven"
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    for settings in ({}, {"length": 99}):
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding(**settings)
        tokens, lengths = tokenization.encode(tokenizer, ["one", text], False)
        assert tokens[lengths[0] :].tolist() == expected
        tokenizer.backend_tokenizer.enable_truncation(3)
        tokenizer.backend_tokenizer.enable_padding(**settings)
        ((tokens, _),) = encode_with_offsets(tokenizer, [text], [[]])
        assert tokens.tolist() == expected


def test_no_more_than_so_many_characters_at_a_time(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenization, "PIECE", 100)
    monkeypatch.setattr(tokenization, "WINDOW", 50)
    monkeypatch.setattr(tokenization, "CHARACTERS", 1000)
    seen, longest, original = [], [], tokenization._encode_at_once
    monkeypatch.setattr(
        tokenization,
        "_encode_at_once",
        lambda t, texts, s: (seen.append(sum(map(len, texts))), longest.extend(texts), original(t, texts, s))[2],
    )
    tokenization.encode(tokenizer, ["word " * 5000, *["some words"] * 1001, "a" * 300, "a" * 5000, "\n" * 300])
    assert max(seen) <= 1000 + 100 and max(map(len, longest)) <= 100


@pytest.mark.slow
def test_a_single_line_of_many_megabytes(assets, tmp_path, caplog):
    """One row, cut, tokenised and made into blocks."""
    words = " ".join(assets.train.read_text().split())
    line = " ".join([words] * (4 * 2**20 // len(words)))
    (tmp_path / "line.txt").write_text(line)
    train = read(tmp_path, train_file=tmp_path / "line.txt")["train"]
    tokenizer = AutoTokenizer.from_pretrained(assets.tokenizer)
    with caplog.at_level(logging.ERROR):
        tokens = tokenise(train, tokenizer, "text")["input_ids"][0]
    assert tokenizer.decode(tokens[:500]) == line[: len(tokenizer.decode(tokens[:500]))]
    assert len(tokens) == len(tokenizer(line, verbose=False)["input_ids"])


@pytest.mark.slow
def test_scripts_read_them(assets, masked_assets, instructions, tmp_path):
    """The three scripts on odd files, and a dataset of the hub with a validation file beside it."""
    (tmp_path / "notes[1].txt").write_text("\n".join(WORDS * 60))
    rows = [{"id": n, "text": WORDS[n % 3]} for n in range(150)]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": row["text"], "source": "manual"} for row in rows])
    pandas.DataFrame(rows).to_csv(tmp_path / "tabs.tsv", sep="\t", index=False)
    pandas.DataFrame(rows).to_csv(tmp_path / "semicolons.csv", sep=";", index=False)
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", rows)
    models = {
        "run_clm": ["--model_name_or_path", assets.gpt2, "--block_size", 32],
        "run_mlm": [*masked_assets.scratch("bert"), "--max_seq_length", 32, "--line_by_line"],
        "run_lora_clm": ["--model_name_or_path", instructions.llama, "--max_seq_length", 64],
    }
    data = {
        "brackets": ["--train_file", tmp_path / "notes[1].txt", "--validation_file", tmp_path / "notes[1].txt"],
        "columns": ["--train_file", train, "--validation_file", other],
        "tabs": ["--train_file", tmp_path / "tabs.tsv", "--validation_file", tmp_path / "semicolons.csv"],
        "hub": ["--dataset_name", tmp_path / "hub", "--validation_file", tmp_path / "notes[1].txt"],
    }
    for script, model in models.items():
        runs = []
        for name, files in data.items():
            runs.append(
                [*model, *files, "--do_train", "--do_eval", "--max_steps", 1, "--max_train_samples", 16, "--use_cpu"]
                + ["--max_eval_samples", 16, "--save_strategy", "no", "--cache_dir", tmp_path / "cache"]
                + ["--save_last_ckpt", "False", "--output_dir", tmp_path / script / name]
            )
        for name, end in zip(data, run_several(script, runs), strict=True):
            assert end.status == 0, f"{script} {name}: {end.log}"
            assert end.metrics["eval_samples"] > 0


@both_ways
@pytest.mark.parametrize("packing", ("gz", "zst"))
def test_a_compressed_file_that_is_cut_off(tmp_path, streaming, packing):
    """An aborted download: beyond the start, which is looked at before anything else, as well."""
    import zstandard

    pack = {"gz": gzip.compress, "zst": zstandard.compress}[packing]
    lines = "".join(f"{hashlib.sha256(bytes([n % 256, n // 256])).hexdigest()}\n" for n in range(9000))
    for ending, content in {
        "txt": lines,
        "csv": f"text\n{lines}",
        "jsonl": re.sub("(.+)", r'{"text": "\1"}', lines),
    }.items():
        whole = pack(content.encode())
        path = tmp_path / f"a.{ending}.{packing}"
        path.write_bytes(whole)
        assert [text.strip() for text in train_texts(tmp_path, streaming, train_file=path)] == lines.split()
        path.write_bytes(whole[: 3 * len(whole) // 4])
        with pytest.raises(UserError, match=f"a.{ending}.{packing}: compressed data are truncated or damaged"):
            train_texts(tmp_path, streaming, train_file=path)


NUMBERS = ["5", "2.5", "1.36", "9007199254740993", "85223372036854775807", "-0.1", "1e-07"]


@both_ways
def test_numbers_stay_as_they_are_written(tmp_path, streaming, monkeypatch):
    """Whole ones and floats in a column, in blocks of their own, too: 5 is not 5.0."""
    monkeypatch.setattr(json_lines, "BLOCK", 16)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": {number}}}\n' for number in NUMBERS))
    assert train_texts(tmp_path, streaming, "text", train_file=tmp_path / "a.jsonl") == NUMBERS
    monkeypatch.undo()
    assert train_texts(tmp_path, streaming, "text", train_file=tmp_path / "a.jsonl") == NUMBERS
    for name, number in {"whole": pa.array([5]), "float": pa.array([2.5])}.items():
        pyarrow.parquet.write_table(pa.table({"text": number}), tmp_path / f"{name}.parquet")
    assert train_texts(tmp_path, streaming, "text", train_file=tmp_path / "*.parquet") == ["2.5", "5"]


def test_floats_among_other_numbers_are_floats():
    block = b'{"a": 1.5, "b": {"n": 1, "x": 2.0}, "c": [0.5, 2.0]}\n{"a": 2.0, "b": {"n": 2, "x": 1.5}, "c": []}\n'
    schema = json_lines.json_table("a.jsonl", 1, block).schema
    assert str(schema.field("a").type) == "double" and str(schema.field("b").type) == "struct<n: int64, x: double>"
    assert str(schema.field("c").type) == "list<item: double>"


def test_json_within_lists_and_objects_is_decoded():
    """As `datasets` itself reads some of the hub; by its own decoder 1.36 would be 1.3599999999999999."""
    json_column = pa.array(['{"n": 1.36}', None, "[18446744073709551616]"], pa.json_())
    objects = pa.StructArray.from_arrays([json_column, pa.array([1, 2, 3])], ["a", "b"])
    table = pa.table({"x": pa.ListArray.from_arrays([0, 2, 3], objects)})
    assert values_of(table, "x") == [
        [{"a": {"n": 1.36}, "b": 1}, {"b": 2}],
        [{"a": [2**64], "b": 3}],
    ]


def test_numbers_within_json_stay_as_they_are_written(tmp_path):
    rows = [f'{{"a": [{{"n": {number}}}], "b": {{"of": {number}}}}}\n' for number in [*NUMBERS, '"word"']]
    for name, lines in {"numbers": rows[:-1], "words": rows}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(lines))
        table = read(tmp_path, train_file=path)["train"].with_format("arrow")[:]
        for column in ("a", "b"):
            assert list(map(json.dumps, values_of(table, column))) == [
                json.dumps(json.loads(x)[column]) for x in lines
            ]


@both_ways
def test_a_line_of_a_later_block_has_its_number(tmp_path, streaming, monkeypatch):
    monkeypatch.setattr(json_lines, "BLOCK", 16)
    (tmp_path / "a.jsonl").write_text('{"text": "a line"}\n' * 6 + "{text}\n")
    with pytest.raises(UserError, match="a.jsonl, line 7: not valid JSON"):
        train_texts(tmp_path, streaming, train_file=tmp_path / "a.jsonl")


@both_ways
def test_a_file_that_is_not_utf8(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xe4bc"}\n')
    with pytest.raises(UserError, match="a.jsonl, line 2: not UTF-8"):
        train_texts(tmp_path, streaming, train_file=tmp_path / "a.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.txt").write_bytes(b"one\n\xe4bc\n")
    with pytest.raises(UserError, match="train.txt, line 2: not UTF-8"):
        train_texts(tmp_path, streaming, dataset_name=tmp_path / "data", train_file="")


@pytest.mark.parametrize("name", ("a.csv", "a.jsonl", "a.json", "a.parquet"))
def test_a_file_without_rows(tmp_path, name):
    pyarrow.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    for other, content in {"a.csv": "text,n\n", "a.jsonl": "{}\n{}\n", "a.json": "[]"}.items():
        (tmp_path / other).write_text(content)
    with pytest.raises(UserError, match=f"{name}: no rows"):
        train_texts(tmp_path, train_file=tmp_path / name)


@both_ways
def test_texts_of_a_folder(tmp_path, streaming):
    """`--dataset_name FOLDER` with .txt files: line breaks and the mark of a program are treated as those of files."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(WORDS).encode())
    of_file = train_texts(tmp_path, streaming, train_file=tmp_path / "data/train.txt")
    raw = read(tmp_path, streaming, train_file="", dataset_name=tmp_path / "data")
    assert [row["text"] for row in raw["train"]] == of_file == [f"{WORDS[0]}\n", f"{WORDS[1]}\n", WORDS[2]]
    with pytest.raises(UserError, match="train.txt: is a file; give it by --train_file"):
        read(tmp_path, streaming, train_file="", dataset_name=tmp_path / "data/train.txt")


@both_ways
def test_a_folder_says_how_it_is_read(tmp_path, streaming):
    (tmp_path / "train.txt").write_text("a\nb\n\nc\n")
    settings = "config_name: default\n  data_files: train.txt\n  sample_by: paragraph"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- {settings}\n---\n")
    raw = read(tmp_path, streaming, train_file="", dataset_name=tmp_path)
    assert [row["text"].rstrip() for row in raw["train"]] == ["a\nb", "c"]


@both_ways
def test_rows_that_datasets_has_saved(tmp_path, streaming):
    Dataset.from_dict({"text": WORDS}).save_to_disk(tmp_path / "saved")
    raw = read(tmp_path, streaming, train_file="", dataset_name=tmp_path / "saved")
    assert [row["text"] for row in raw["train"]] == WORDS
    raw = read(tmp_path, streaming, True, train_file="", dataset_name=tmp_path / "saved")
    assert [row["text"] for row in raw["validation"]] == WORDS[:1]
    (tmp_path / "folder").mkdir()
    (tmp_path / "saved/data-00000-of-00001.arrow").rename(tmp_path / "folder/train.arrow")
    raw = read(tmp_path, streaming, train_file="", dataset_name=tmp_path / "folder")
    assert [row["text"] for row in raw["train"]] == WORDS


@both_ways
def test_splits_that_datasets_has_saved(tmp_path, streaming):
    """What was cached beside them, by `datasets` or an earlier run, is not read, and this run caches nothing there."""
    saved = tmp_path / "saved"
    own = Dataset.from_dict({"text": WORDS})
    DatasetDict({"train": own, "valid": own.select([0]), "test": own.select([])}).save_to_disk(saved)
    load_from_disk(saved / "train").map(lambda row: {"n": 1}, remove_columns=["text"])
    before = sorted(saved.rglob("*"))
    assert any(path.name.startswith("cache-") for path in before)
    raw = read(tmp_path, streaming, True, train_file="", dataset_name=saved)
    assert [row["text"] for row in raw["train"]] == WORDS and [row["text"] for row in raw["validation"]] == WORDS[:1]
    if not streaming:
        raw["train"].map(lambda row: {"n": 2})
    assert sorted(saved.rglob("*")) == before
    own.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match="needs .* a dataset that has a split named train"):
        read(tmp_path, streaming, train_file="", dataset_name=tmp_path / "none")
    (saved / "train/data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match="saved: not whole, as `save_to_disk` writes it .*data-00000-of-00001.arrow"):
        read(tmp_path, streaming, True, train_file="", dataset_name=saved)
    (saved / "train/state.json").write_text("[]")
    with pytest.raises(UserError, match="saved: not whole"):
        read(tmp_path, streaming, True, train_file="", dataset_name=saved)


@both_ways
def test_files_of_a_folder_that_nobody_reads_are_named(tmp_path, streaming, caplog):
    """`datasets` reads the files of the commonest format alone."""
    folder = tmp_path / "data"
    (folder / ".cache").mkdir(parents=True)
    for number, name in enumerate(("a.jsonl", "more/b.jsonl", "c.txt", ".cache/d.json", "dataset_info.json")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"text": WORDS[number % 3]}) if name != "dataset_info.json" else "{}")
    raw = read(tmp_path, streaming, train_file="", dataset_name=folder)
    assert [row["text"] for row in raw["train"]] == WORDS[:2]
    assert caplog.messages[-1].endswith(": c.txt")
    (folder / "c.txt").unlink()
    caplog.clear()
    read(tmp_path, streaming, train_file="", dataset_name=folder)
    assert "not read" not in caplog.text
    for name in ("train-0", "more"):  # `datasets` takes those that name a split
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}]).rename(folder / "more" / f"{name}.jsonl")
    read(tmp_path, streaming, train_file="", dataset_name=folder)
    assert caplog.messages[-1].endswith("or a name that belongs to no split): a.jsonl, more/b.jsonl, more/more.jsonl")


def test_a_glob_over_folders(tmp_path):
    for folder in ("g", "g/x", "g/x/y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(f"{folder}\n")
    assert train_texts(tmp_path, train_file=tmp_path / "g/**/*.txt") == ["g\n", "g/x\n", "g/x/y\n"]


def test_a_file_without_the_column_of_the_others_is_named(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text\none\n")
    (tmp_path / "b.csv").write_text("content\ntwo\n")
    with caplog.at_level(logging.WARNING, "gaudi_lm"):
        assert train_texts(tmp_path, train_file=tmp_path / "*.csv") == ["one", ""]
    assert f"{tmp_path / 'b.csv'} has no column 'text', which {tmp_path / 'a.csv'} has" in caplog.text


def test_validation_rows_that_were_trained_on_are_said(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("\n".join(WORDS))
    with caplog.at_level(logging.WARNING, "gaudi_lm"):
        data = DataArguments(train_file=str(tmp_path / "a.txt"))
        load_raw(data, ModelArguments(cache_dir=str(tmp_path / "cache")), True, True)
        assert not caplog.records
        load_raw(data, ModelArguments(cache_dir=str(tmp_path / "cache")), False, True)
    assert "a run with --do_train alone has trained on these rows" in caplog.text


def test_an_error_of_a_process_that_loads_data_is_one_line():
    try:
        raise UserError("a.jsonl, line 3: not valid JSON")
    except UserError:
        sent = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UserError, match="^a.jsonl, line 3: not valid JSON$"):
        sent.reraise()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"Not a directory: /dev/null/cache.*set HF_HOME or --cache_dir"):
        read_files(FileSet("text", (str(tmp_path / "a.txt"),)), "/dev/null/cache")


def test_a_file_that_is_no_utf_8(tmp_path):
    for name, content, words in (
        ("a.txt", "words".encode("utf-16"), "a.txt: UTF-16; convert it to UTF-8"),
        ("b.txt", b"a\0b", "b.txt: a binary file, not text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"^--train_file .*{words}$"):
            train_texts(tmp_path, False, train_file=tmp_path / name)

"""A cached result is found again exactly where nothing that decides its rows has changed."""

import functools
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from running import copy_elsewhere, environment, load_script, run, run_ranks
from tokenised import LORA, tokenised
from tokenizers import AddedToken
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer

from gaudi_lm.data import blocks, masking
from gaudi_lm.data.blocks import map_rows, tokenise
from gaudi_lm.data.fingerprints import fingerprint

MLM = load_script("run_mlm")
SOURCE = """
import enum
import re
import typing

PROMPT = "Question: {} Answer:"
NAMES = ["a", "b"]
LOWER = {"x", "y", "zz"}
PATTERN = re.compile("[a-z]+")


def strip(text, marks=".!"):
    return text.strip(marks)


def join(first, second):
    return first + second


def number(text):
    try:
        value = int(text)
    except ValueError:
        return None
    value = NAMES[value]
    return value


class Turn(typing.NamedTuple):
    role: str

    def text(self):
        return self.role.upper()


class Kind(str, enum.Enum):
    USER = "user"

    def text(self):
        return self.value.lower()


class Form:
    ending = "\\n"

    def fill(self, text):
        return PROMPT.format(strip(text)) + self.ending


COLUMNS = {"x": strip, "y": number, "z": strip, "w": number}


def make(size, form=Form(), turn=Turn("user"), kind=Kind.USER):
    def rows(table):
        table = [join(first=COLUMNS[turn.text()](text), second=kind.text()) for text in table]
        # a comment
        texts = [form.fill(text)[:size] for text in table if PATTERN.match(text) and text in LOWER]
        return sorted(texts, key=lambda text: NAMES.index(text))

    return rows
"""

CHANGES = {
    "prompt": ("Question: {}", "Q: {}"),
    "list": ('["a", "b"]', '["b", "a"]'),
    "set": ('"zz"', '"z"'),
    "pattern": ("[a-z]+", "[a-z]*"),
    "default": ('marks=".!"', 'marks="."'),
    "function": ("text.strip(marks)", "text.rstrip(marks)"),
    "class": ('ending = "\\n"', 'ending = ""'),
    "method": ("+ self.ending", "+ 2 * self.ending"),
    "expression": ("[:size]", "[: size + 1]"),
    "lambda": ("NAMES.index(text)", "-NAMES.index(text)"),
    "which function": ('"z": strip, "w": number', '"z": number, "w": strip'),
    "names of arguments": (
        "join(first, second):\n    return first + second",
        "join(second, first):\n    return second + first",
    ),
    "within a try": (
        "        value = int(text)\n    except ValueError:\n        return None\n    value = NAMES[value]\n",
        "        value = int(text)\n        value = NAMES[value]\n    except ValueError:\n        return None\n",
    ),
    "method of a tuple": ("self.role.upper()", "self.role.lower()"),
    "method of a text": ("self.value.lower()", "self.value.upper()"),
    "condition": ("and text in LOWER", "or text in LOWER"),
}


def functions(source: str) -> types.ModuleType:
    module = types.ModuleType("script_of_a_user")
    exec(source, module.__dict__)
    return module


@pytest.mark.parametrize("change", CHANGES)
def test_code_counts(change):
    old, new = CHANGES[change]
    assert old in SOURCE
    changed = functions(SOURCE.replace(old, new))
    assert fingerprint(changed.make(3)) != fingerprint(functions(SOURCE).make(3))


def test_values_count_and_layout_does_not():
    first = functions(SOURCE)
    assert fingerprint(first.make(3)) != fingerprint(first.make(4))
    other_layout = SOURCE.replace("        # a comment\n", "\n\n        # another comment\n")
    unrelated = other_layout + "\n\ndef other():\n    return 1\n"
    assert fingerprint(functions(unrelated).make(3)) == fingerprint(first.make(3))


def made(body: str, **names):
    """A class ``Made``, with what it needs."""
    space = {"__name__": "script_of_a_user", **names}
    exec("import functools\n" + body, space)
    return space["Made"]


class Base:
    def __init__(self, value):
        self.value = value

    def get(self):
        return self.value


class Other(Base):
    def get(self):
        return 2 * self.value


DIFFER = {
    "constants": (lambda: "one", lambda: "two"),
    "lists and tuples": ([1], (1,)),
    "where a tuple ends": (((1,), 2), ((1, 2),)),
    "sets": ({"a"}, {"b"}),
    "functions given a value": (functools.partial(lambda x: x, 1), functools.partial(lambda x: x, 2)),
    "methods given a value": (
        made("class Made: f = functools.partialmethod(lambda self: 1)"),
        made("class Made: f = functools.partialmethod(lambda self: 2)"),
    ),
    "methods of instances": (Base(lambda: 1).get, Base(lambda: 2).get),
    "attributes": (Base(lambda: 1), Base(lambda: 2)),
    "decorated functions": (functools.cache(lambda: 1), functools.cache(lambda: 2)),
    "functions of libraries": (json.dumps, json.loads),
    "types of libraries": (pa.Table, pa.Array),
    "modules": (json, pa),
    "bases": (made("class Made(base): pass", base=Base), made("class Made(base): pass", base=Other)),
    "slots": [made(f"class Made:\n __slots__ = ()\n def f(self): return {value}")() for value in (1, 2)],
    "names of members": (made("class Made: x, y = 1, 2"), made("class Made: y, x = 1, 2")),
    **{
        name: tuple(made(f"class Made:\n {head}: return {value}") for value in (1, 2))
        for name, head in {
            "static methods": "@staticmethod\n def f()", "properties": "@property\n def f(self)",
            "class methods": "@classmethod\n def f(cls)", "special methods": "def __call__(self)",
            "cached properties": "@functools.cached_property\n def f(self)",
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", DIFFER)
def test_values_that_do_something_else(kind):
    one, other = DIFFER[kind]
    assert fingerprint(one) != fingerprint(other)


USES = {
    "attribute": "import {module} as mine\n\ndef rows():\n    return mine.fill()\n",
    "name": "from {module} import fill\n\ndef rows():\n    return fill()\n",
    "inside": "def rows():\n    import {module}\n    return {module}.fill()\n",
}


@pytest.mark.parametrize("use", USES)
def test_modules_of_a_user_count(tmp_path, monkeypatch, use):
    """By attribute, by name, and where a function imports them itself."""
    monkeypatch.syspath_prepend(tmp_path)
    module = f"prompts_by_{use}"

    def with_text(text: str) -> str:
        (tmp_path / f"{module}.py").write_text(f"TEXT = {text!r}\n\ndef fill():\n    return TEXT\n")
        sys.modules.pop(module, None)
        importlib.invalidate_caches()
        return fingerprint(functions(USES[use].format(module=module)).rows)

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # compiled modules are told apart by whole seconds
    first = with_text("one")
    assert with_text("another") != first == with_text("one")


@pytest.mark.slow
def test_the_same_in_every_process(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    program = "from gaudi_lm.data.fingerprints import fingerprint; import mine; print(fingerprint(mine.make(3)))"
    found = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
            env=environment(PYTHONHASHSEED=str(seed), PYTHONPATH=str(Path(blocks.__file__).parents[1])),
        ).stdout
        for seed in range(2)  # the second one finds compiled modules
    }  # fmt: skip
    assert len(found) == 1


@pytest.fixture()
def tokenizer(assets):
    return AutoTokenizer.from_pretrained(assets.tokenizer)


def test_a_used_tokenizer_is_the_same(assets, tokenizer):
    fresh = fingerprint(tokenizer)
    tokenizer("a longer text than that", truncation=True, max_length=3)
    blocks.encode(tokenizer, ["some text"])
    assert fingerprint(tokenizer) == fresh == fingerprint(AutoTokenizer.from_pretrained(assets.tokenizer))


@pytest.mark.parametrize("change", ("template", "token", "normalizer", "eos", "split"))
def test_a_changed_tokenizer_is_another(tokenizer, change):
    before = fingerprint(tokenizer)
    if change == "template":
        tokenizer.chat_template = "{{ messages }}"
    elif change == "token":
        tokenizer.add_tokens([AddedToken("assert", lstrip=True)])
    elif change == "normalizer":
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    elif change == "eos":
        tokenizer.eos_token = "the"
    else:
        tokenizer.split_special_tokens = True
    assert fingerprint(tokenizer) != before


def test_slow_tokenizers(tmp_path):
    """The vocabulary is the same; merges, or a setting, are not."""
    vocabulary = {token: number for number, token in enumerate(["a", "b", "c", "ab", "bc", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    prints = []
    for merges in ("a b\nb c", "b c\na b", "a b\nb c"):
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        prints.append(fingerprint(GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))))
    assert prints[0] == prints[2] != prints[1]
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n")
    cased, uncased = (BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=lower) for lower in (False, True))
    assert fingerprint(cased) != fingerprint(uncased)


def test_special_tokens_in_a_text(tokenizer):
    """`split_special_tokens` holds, whatever the tokenizer did before."""
    text = "one<|endoftext|>two"
    whole = blocks.encode(tokenizer, [text])[0].tolist()
    assert tokenizer.eos_token_id in whole
    tokenizer.split_special_tokens = True
    assert tokenizer.eos_token_id not in blocks.encode(tokenizer, [text])[0].tolist()


@pytest.fixture()
def on_disk(tmp_path):
    """Rows that are read from a file, as what is made of them is cached beside it."""
    rows = [{"instruction": f"Say {n}", "input": "", "output": f"{n}!", "text": f"text {n}"} for n in range(20)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    return Dataset.load_from_disk(str(tmp_path / "rows"))


def examples(rows: Dataset, tokenizer, **style) -> Dataset:
    return tokenised(tokenizer, rows.remove_columns("text"), 256, style)


MAKERS = {
    "blocks": lambda rows, tokenizer: tokenise(rows, tokenizer, "text"),
    "lines": lambda rows, tokenizer: MLM.make_lines(rows, tokenizer, "text", 32, None, "train"),
    "instructions": examples,
    "chat": lambda rows, tokenizer: examples(rows, tokenizer, chat_prompt=True),
}


@pytest.mark.parametrize("make", MAKERS)
def test_a_result_is_found_again(on_disk, assets, masked_assets, instructions, make, monkeypatch):
    """The file of the second result is that of the first; with something changed it is another, with other rows."""
    folder = {"lines": masked_assets.roberta, "blocks": assets.tokenizer}.get(make, instructions.llama)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = MAKERS[make](on_disk, tokenizer)
    again = MAKERS[make](on_disk, AutoTokenizer.from_pretrained(folder))
    assert first.cache_files and again.cache_files == first.cache_files
    assert MAKERS[make](on_disk, tokenizer).cache_files == first.cache_files, "after its first use"
    if make == "instructions":
        monkeypatch.setattr(LORA, "WITHOUT_INPUT", "Do this: {instruction}\n")
    elif make == "chat":
        tokenizer.chat_template = tokenizer.chat_template.replace("<|", "[").replace("|>", "]")
    else:
        original = blocks.encode

        def encode(tokenizer, texts, add_special_tokens=True):
            return original(tokenizer, [text.upper() for text in texts], add_special_tokens)

        for module in (blocks, masking):
            monkeypatch.setattr(module, "encode", encode)
    changed = MAKERS[make](on_disk, tokenizer)
    assert changed.cache_files != first.cache_files
    assert changed["input_ids"][:] != first["input_ids"][:]


@pytest.mark.slow
def test_a_new_process_finds_the_conversations(instructions, tmp_path):
    """Another process, with other seeds of hashing, finds what the first one made."""
    files = set()
    for fresh in (False, True):
        run(
            "run_lora_clm.py", "--model_name_or_path", instructions.llama, "--do_eval", "--chat_prompt",
            "--validation_file", instructions.validation, "--use_cpu", "--cache_dir", tmp_path / "cache",
            "--output_dir", tmp_path / "out", fresh=fresh,
        )  # fmt: skip
        files.add(frozenset(path.name for path in (tmp_path / "cache").rglob("*.arrow")))
    assert len(files) == 1 and len(files.pop()) == 2


def test_a_cached_result_is_not_made_again(on_disk, tmp_path):
    journal = str(tmp_path / "journal")

    def rows(table: pa.Table) -> pa.Table:
        with open(journal, "a") as file:
            file.write("made\n")
        return pa.table({"n": table.column("text").to_pylist()})

    map_rows(on_disk, rows)
    map_rows(on_disk, rows)
    assert Path(journal).read_text() == "made\n"
    map_rows(on_disk, rows, use_cache=False)
    assert Path(journal).read_text() == "made\nmade\n"


@pytest.mark.slow
def test_a_changed_copy_of_a_script(assets, tmp_path):
    """A user's own way to tokenise, changed: new rows. Unchanged: the cached ones, from one rank and from two."""
    script = copy_elsewhere("run_clm.py", tmp_path / "elsewhere")
    source = script.read_text().replace(
        "    tokens = tokenise(texts, tokenizer, column, max_tokens=max_tokens, **options)\n",
        "    def encode_rows(table):\n"
        "        texts = [change(text) for text in table.column(column).to_pylist()]\n"
        "        return pa.table({'input_ids': to_list_array(*encode(tokenizer, texts))})\n\n"
        "    tokens = map_rows(texts, encode_rows, wanted=max_tokens, measure=count_tokens, **options)\n",
    )
    source = source.replace(
        "import group_into_blocks, tokenise\n",
        "import count_tokens, encode, group_into_blocks, map_rows, to_list_array\nimport pyarrow as pa\n",
    )
    assert "change(text)" in source and "map_rows, to" in source

    def evaluate(change: str, ranks: int = 1) -> tuple[float, set[str]]:
        script.write_text(
            source.replace("@dataclass\n", f"def change(text):\n    return {change}\n\n\n@dataclass\n", 1)
        )
        flags = [
            "--model_name_or_path", assets.gpt2, "--validation_file", assets.validation, "--do_eval", "--use_cpu",
            "--block_size", 64, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out",
        ]  # fmt: skip
        if ranks == 1:
            run(script, *flags)
        else:
            run_ranks(ranks, script, *flags)
        loss = json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_loss"]
        return loss, {path.name for path in (tmp_path / "cache").rglob("cache-*.arrow")}

    loss, files = evaluate("text")
    assert len(files) == 1
    assert evaluate("text") == (loss, files)
    other_loss, more = evaluate("text.upper()")
    assert other_loss != loss and len(more) == 2
    assert evaluate("text", ranks=2)[1] == more

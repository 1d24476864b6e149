"""How flags are read, from the command line and from files."""

import json
import os
import shutil
from dataclasses import dataclass, field

import pytest

from gaudi_lm.arguments.parsing import build_parser, parse
from gaudi_lm.config_files import expand_config_file
from gaudi_lm.errors import UserError


@dataclass
class Flags:
    """One flag of each kind."""

    save_strategy: str = field(default="steps", metadata={"choices": ["no", "steps"]})
    max_steps: int = -1
    offset: float = 0.5
    max_seq_length: int | None = None
    max_seq_items: int | None = None
    model_revision: str | None = None
    eval_strategy: str | None = None
    use_cpu: bool = False
    use_cache: bool = True
    greater_is_better: bool | None = None
    report_to: list[str] | None = field(default_factory=lambda: ["none"])
    deepspeed: str | None = None


def flags(*words: str) -> Flags:
    return parse(list(words), Flags)[0]


def test_help_of_flags_of_ones_own():
    @dataclass
    class Own:
        weights: list[float] = field(default_factory=lambda: [0.5, 1.0], metadata={"help": "About 50% of them."})
        plain: int = 3

    shown = build_parser(Own).format_help()
    assert "About 50% of them. (default: 0.5 1.0)" in shown
    assert "--plain PLAIN\n" in shown, "no text, rather than another flag's"


CONTENTS = {
    # A word of YAML that is a flag's choice, whole numbers however written, text that looks like a number.
    "no.yaml": (b"save_strategy: no\nmax_steps: 2.0\nmodel_revision: 1.10\n", ("no", 2, "1.10")),
    "quoted.yaml": (b'save_strategy: "no"\nmax_steps: 1e3\nmodel_revision: 2024-01-01\n', ("no", 1000, "2024-01-01")),
    "mark.yaml": (b"\xef\xbb\xbfsave_strategy: no\nmax_steps: 3\nmodel_revision: -x\n", ("no", 3, "-x")),
    "mark.json": (
        b'\xef\xbb\xbf{"save_strategy": "no", "max_steps": 3.0, "model_revision": "-x"}',
        ("no", 3, "-x"),
    ),
    "null.yaml": (b"save_strategy: ~\nmax_steps: null\nmodel_revision:\n", ("steps", -1, None)),
    "dashes.yaml": (b"--save-strategy: no\nmax-steps: 4\n<<: {model_revision: merged}\n", ("no", 4, "merged")),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_values_of_a_file_mean_what_is_written(name, tmp_path):
    content, expected = CONTENTS[name]
    (tmp_path / name).write_bytes(content)
    read = flags(str(tmp_path / name))
    assert (read.save_strategy, read.max_steps, read.model_revision) == expected


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("on", True), ("no", False), ("off", False), ("1", True)])
def test_booleans(text, value, tmp_path):
    (tmp_path / "run.yaml").write_text(f"use_cpu: {text}\ngreater_is_better: {text}\n")
    read = flags(str(tmp_path / "run.yaml"))
    assert read.use_cpu is value and read.greater_is_better is value
    assert flags("--use_cpu", text).use_cpu is value
    assert flags("--greater_is_better").greater_is_better is True
    assert flags("--no-use-cache").use_cache is False


def test_a_flag_that_is_no_boolean_needs_a_value(capsys):
    with pytest.raises(SystemExit):
        flags("--max_steps")
    assert capsys.readouterr().err == "error: argument --max_steps/--max-steps: expected one argument\n"


def test_mappings_and_lists_of_a_file(tmp_path):
    mapping = {"zero_optimization": {"stage": 2, "overlap_comm": False}, "optimizer": {"lr": 1e-5}, "since": "2024"}
    (tmp_path / "run.json").write_text(json.dumps({"deepspeed": mapping, "report_to": ["a", "b"]}))
    (tmp_path / "run.yaml").write_text(
        "deepspeed:\n  zero_optimization: {stage: 2, overlap_comm: no}\n  optimizer:\n    lr: 1e-5\n  since: '2024'\n"
        "report_to: [a, b]\n"
    )
    for name in ("run.json", "run.yaml"):
        read = flags(str(tmp_path / name))
        assert json.loads(read.deepspeed) == mapping
        assert read.report_to == ["a", "b"]


def test_words_that_are_not_utf_8(tmp_path):
    """Such as a file name of old: a traceback of the tokenizer in the first checkpoint, or of the model card."""
    (tmp_path / "run.json").write_text('{"model_revision": "\\ud83d"}')
    shutil.copy(tmp_path / "run.json", tmp_path / (old := os.fsdecode(b"t\xe9.json")))
    for words, shown in (
        (["--model_revision", os.fsdecode(b"t\xe9")], r"'t\udce9'"),
        ([str(tmp_path / "run.json")], r"\ud83d"),
        ([str(tmp_path / old), "--model_revision", "x"], r"/t\udce9.json"),
    ):
        with pytest.raises(UserError) as caught:
            flags(*words)
        assert shown in str(caught.value) and "is not UTF-8" in str(caught.value)
    assert flags("--model_revision", "té").model_revision == "té"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("twice.yaml", b"max_steps: 1\nmax_steps: 2\n", ["twice.yaml, line 2", "max_steps", "twice"]),
        ("twice.json", b'{"max_steps": 1, "max_steps": 2}', ["twice.json", "max_steps", "twice"]),
        ("latin.yaml", b"model_revision: d\xe9j\xe0\n", ["latin.yaml", "UTF-8"]),
        ("half.yaml", b"max_steps: 2.5\n", ["--max_steps", "2.5", "whole number"]),
        ("scalar.yaml", b"max_steps\n", ["scalar.yaml", "str"]),
        ("empty.yaml", b"", ["empty.yaml", "NoneType"]),
        ("control.yaml", b"max_steps: 1\nmodel_revision: '\x07'\n", ["control.yaml, line 2", "U+0007"]),
        ("list.yaml", b"max_steps: 1\n? [a, b]\n: 3\n", ["list.yaml, line 2", "a key is a word", "sequence"]),
        ("map.yaml", b"deepspeed: {? {a: b} : 3}\n", ["map.yaml, line 1", "a key is a word", "mapping"]),
        ("itself.yaml", b"report_to: &a [*a]\n", ["itself.yaml, line 1", "contains itself"]),
        ("itself2.yaml", b"deepspeed: &a {x: {y: *a}}\n", ["itself2.yaml, line 1", "contains itself"]),
        ("deep.json", b'{"deepspeed":' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["deep.json", "within one another"]),
        ("deep.yaml", b"report_to: " + b"[" * 5_000 + b"]" * 5_000, ["deep.yaml", "within one another"]),
        ("nested.yaml", b"deepspeed:\n  a: 1\n  a: 2\n", ["nested.yaml, line 3", "a is given twice"]),
        ("dash.yaml", b"max_steps: 3\nmax-steps: 4\n", ["dash.yaml", "max_steps and max-steps", "--max_steps"]),
        (
            "old.yaml",
            b"eval_strategy: steps\nevaluation_strategy: no\n",
            ["old.yaml", "evaluation_strategy are the same"],
        ),
        ("typo.yaml", b"max_stepz: 2\n", ["typo.yaml", "--max_stepz", "--max_steps"]),
    ],
)
def test_files_that_cannot_be_meant(name, content, words, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((UserError, SystemExit)) as caught:
        flags(str(tmp_path / name))
    message = str(caught.value) if caught.type is UserError else capsys.readouterr().err
    for word in words:
        assert word in message


def test_numbers_for_text_stay_as_they_are_written_in_json(tmp_path):
    for text in ("1.10", "1e5", "-0.50", "7"):
        (tmp_path / "run.json").write_text(f'{{"model_revision": {text}, "offset": {text}, "report_to": [{text}]}}')
        read = flags(str(tmp_path / "run.json"))
        assert (read.model_revision, read.offset, read.report_to) == (text, float(text), [text])
    (tmp_path / "run.json").write_text('{"deepspeed": {"a": 1e5, "b": 1.10}, "max_steps": 1e3}')
    read = flags(str(tmp_path / "run.json"))
    assert (json.loads(read.deepspeed), read.max_steps) == ({"a": 1e5, "b": 1.1}, 1000)


def test_items_of_a_list_are_values_whatever_they_begin_with(tmp_path):
    for name, text in (("run.yaml", "report_to: ['a b', --x, -h, --max_steps=3]"), ("run.json", None)):
        text = text or '{"report_to": ["a b", "--x", "-h", "--max_steps=3"]}'
        (tmp_path / name).write_text(text)
        read = flags(str(tmp_path / name), "--offset", "2")
        assert read.report_to == ["a b", "--x", "-h", "--max_steps=3"]
        assert (read.max_steps, read.offset) == (-1, 2)


def test_the_command_line_overrides_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("max_steps: 2\nuse_cpu: no\n")
    read = flags(str(tmp_path / "run.yaml"), "--max_steps", "3", "--use_cpu")
    assert (read.max_steps, read.use_cpu) == (3, True)
    assert expand_config_file([str(tmp_path / "run.yaml"), "--seed", "1"])[-2:] == ["--seed", "1"]


def test_a_flag_is_no_configuration_file():
    assert expand_config_file(["--f=kernel.json"]) == ["--f=kernel.json"]
    with pytest.raises(UserError, match="unknown flag --zzz"):
        flags("--zzz=kernel.json")


@pytest.mark.parametrize("text", ["7", "7.0", "7e0", "0.7e1"])
def test_whole_numbers(text):
    assert flags("--max_steps", text).max_steps == 7


@pytest.mark.parametrize("text", ["7.5", "inf", "nan", "seven", ""])
def test_numbers_that_are_not_whole(text, capsys):
    with pytest.raises(SystemExit):
        flags("--max_steps", text)
    assert "--max_steps" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1e-5", "-.5", "-3", "-inf"])
def test_negative_numbers_are_values(text):
    assert flags("--offset", text).offset == float(text)


def test_beginnings_of_flags(capsys):
    assert flags("--max_seq_len", "12").max_seq_length == 12
    assert flags("--max-seq-len=13").max_seq_length == 13
    assert capsys.readouterr().err.splitlines() == [
        "warning: --max_seq_len is taken for --max_seq_length",
        "warning: --max-seq-len is taken for --max_seq_length",
    ]
    assert flags("--max_steps", "4").max_steps == 4
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--max_seq is the beginning of several flags: --max_seq_length, --max_seq_it"):
        flags("--max_seq", "12")
    with pytest.raises(UserError, match="unknown flag --max_seq_lenth; did you mean --max_seq_length"):
        flags("--max_seq_lenth", "12")


@pytest.mark.parametrize("name", ["--evaluation_strategy", "--evaluation-strategy"])
def test_old_names(name, capsys):
    assert flags(f"{name}=epoch").eval_strategy == "epoch"
    assert capsys.readouterr().err == f"warning: {name} is the old name of --eval_strategy\n"


def test_only_the_main_rank_warns(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert flags("--max_seq_len", "12").max_seq_length == 12
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["q_proj,v_proj"], ["q_proj", "v_proj"]),
        (["q_proj v_proj"], ["q_proj", "v_proj"]),
        (["q_proj, v_proj", "o_proj"], ["q_proj", "v_proj", "o_proj"]),
        (["layers.0.q_proj"], ["layers.0.q_proj"]),
        (["all-linear"], "all-linear"),
        ([r".*\.[qv]_proj"], r".*\.[qv]_proj"),
        ([r".*layers\.\d{1,2}\.self_attn\.(q|v)_proj"], r".*layers\.\d{1,2}\.self_attn\.(q|v)_proj"),
        (None, None),
    ],
)
def test_layers_of_an_adapter(words, expected):
    from gaudi_lm.modeling.adapters import chosen_layers

    assert chosen_layers("--lora_target_modules", words) == expected


@pytest.mark.parametrize("words", [["(q_proj"], ["q_.*", "v_proj"], [","]])
def test_layers_that_cannot_be_meant(words):
    from gaudi_lm.modeling.adapters import chosen_layers

    with pytest.raises(UserError, match="^--lora_target_modules"):
        chosen_layers("--lora_target_modules", words)

"""What a user can mend: one line that names the flag or the file, exit code 2, nothing written."""

import errno
import gzip
import io
import json
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from running import ROOT, run, run_many

import gaudi_simulator
from gaudi_lm.errors import UserError, memory_errors, user_errors, warn


@pytest.fixture(scope="module")
def outcomes(assets, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and stderr of run_clm.py for every row of the table, all in one process."""
    folder = tmp_path_factory.mktemp("bad")
    base = ["--output_dir", str(folder / "out"), "--use_cpu", "--do_train"]
    model = ["--model_type", "gpt2", "--tokenizer_name", str(assets.tokenizer)]
    text = ["--train_file", str(assets.train)]
    files = {
        "empty.txt": b"",
        "blank.txt": b"\n \n",
        "binary.txt": b"GIF89a\0\1\2\3" * 100,
        "data.xyz": b"text\n",
        "bad.jsonl": b'{"text": "one"}\n{"text": "two"}\n{"text": \n',
        "list.jsonl": b'{"text": "one"}\n[1, 2]\n',
        "mixed.jsonl": b'{"text": "words"}\n{"text": [5]}\n',
        "numbers.jsonl": b'{"n": 5, "m": 1}\n{"n": 6}\n',
        "latin.txt": b"good\n" + "déjà\n".encode("latin-1") * 3,
        "fake.parquet": b"not parquet at all",
        "cut.txt.gz": gzip.compress(b"some text\n" * 1000)[:60],
        "tiny.txt": b"A few words.\n",
        "data.csv": b"a,b\nx,y\nz,w\n",
        "broken.json": b'{"model_type": "gpt2",\n "do_train": }',
        "broken.yaml": b"model_type: gpt2\n  do_train: [true\n",
        "list.yaml": b"- model_type\n- gpt2\n",
        "unknown.json": json.dumps({"model_typo": "gpt2", "use_cpu": True}).encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "full").mkdir()
    (folder / "full" / "something").write_text("kept")
    (folder / "notes").mkdir()

    def at(name: str) -> str:
        return str(folder / name)

    def data(name: str) -> list[str]:
        return [*base, *model, "--train_file", at(name)]

    cases = {
        "no data": [*base, *model],
        "missing file": data("nowhere.txt"),
        "empty file": data("empty.txt"),
        "blank file": data("blank.txt"),
        "directory": data("notes"),
        "binary": data("binary.txt"),
        "ending": data("data.xyz"),
        "no glob match": data("*.nothing.txt"),
        "JSON line": data("bad.jsonl"),
        "JSON list": data("list.jsonl"),
        "mixed types": data("mixed.jsonl"),
        "numbers": data("numbers.jsonl"),
        "latin-1": data("latin.txt"),
        "parquet": data("fake.parquet"),
        "cut gzip": data("cut.txt.gz"),
        "missing column": [*data("data.csv"), "--text_column_name", "text"],
        "kinds": data("[dt]*.[ct]*"),
        "delimiter": [*data("tiny.txt"), "--csv_delimiter", ";"],
        "hub and file": [*base, *model, *text, "--dataset_name", "wikitext"],
        "no such dataset": [*base, *model, "--dataset_name", "nobody/nothing"],
        "zero blocks": [*data("tiny.txt"), "--block_size", "128"],
        "block size 0": [*base, *model, *text, "--block_size", "0"],
        "block size -5": [*base, *model, *text, "--block_size", "-5"],
        "split 0": [*base, *model, *text, "--validation_split_percentage", "0"],
        "split 100": [*base, *model, *text, "--validation_split_percentage", "100"],
        "max samples 0": [*base, *model, *text, "--max_train_samples", "0"],
        "overrides with a model": [*base, *text, "--model_name_or_path", "x", "--config_overrides", "n_embd=8"],
        "overrides unknown": [*base, *model, *text, "--config_overrides", "n_layers=2"],
        "overrides type": [*base, *model, *text, "--config_overrides", "n_layer=two"],
        "overrides form": [*base, *model, *text, "--config_overrides", "n_layer"],
        "model type": [*base, *text, "--model_type", "gtp2", "--tokenizer_name", str(assets.tokenizer)],
        "no model": [*base, *text, "--tokenizer_name", str(assets.tokenizer)],
        "no such model": [*base, *text, "--model_name_or_path", "nobody/nothing"],
        "no tokenizer": [*base, *text, "--model_type", "gpt2"],
        "no such tokenizer": [*base, *text, "--model_type", "gpt2", "--tokenizer_name", at("notes")],
        "frozen vocabulary": [*base, *model, *text, "--config_overrides", "vocab_size=100"],
        "streaming": [*base, *model, *text, "--streaming"],
        "no card": ["--output_dir", at("out"), "--do_train", *model, *text],
        "no Gaudi": ["--output_dir", at("out"), "--do_train", "--use_habana", *model, *text],
        "not a boolean": ["--output_dir", at("out"), "--do_train", "--use_habana", "perhaps", *model, *text],
        "full directory": ["--output_dir", at("full"), "--use_cpu", "--do_train", *model, *text],
        "no checkpoint": [*base, *model, *text, "--resume_from_checkpoint", at("notes")],
        "name too long": ["--output_dir", at("x" * 300), "--use_cpu", "--do_train", *model, *text],
        "unknown flag": [*base, *model, *text, "--blok_size", "8"],
        "stray word": [*base, *model, *text, "--streaming", "true", "oops"],
        "not a number": [*base, *model, *text, "--block_size", "many"],
        "nothing to do": ["--output_dir", at("out"), "--use_cpu", *model, *text],
        "config missing": [at("nowhere.json"), *base],
        "config broken JSON": [at("broken.json"), *base],
        "config broken YAML": [at("broken.yaml"), *base],
        "config list": [at("list.yaml"), *base],
        "config key": [at("unknown.json"), *base],
        "no validation": [*base[:-1], "--do_eval", *model, *text, "--validation_split_percentage", "0"],
        "gaudi config": [
            "--output_dir", at("out"), "--do_train", "--use_habana", "--gaudi_config_name", at("notes"), *model, *text
        ],
    }  # fmt: skip
    # A broken file is found before the model is loaded; a card that is not there before anything is imported.
    found = run_many("run_clm.py", cases, folder)
    assert not (folder / "out").exists(), "a refused run wrote into --output_dir"
    assert [path.name for path in (folder / "full").iterdir()] == ["something"]
    return found


WORDS = {
    "no data": ["--dataset_name", "--train_file"],
    "missing file": ["--train_file", "nowhere.txt", "no such file"],
    "empty file": ["--train_file", "empty.txt", "empty"],
    "blank file": ["--train_file", "blank.txt", "empty"],
    "directory": ["--train_file", "notes", "directory"],
    "binary": ["--train_file", "binary.txt", "binary"],
    "ending": ["--train_file", "data.xyz", "csv"],
    "no glob match": ["--train_file", "*.nothing.txt", "no file matches"],
    "JSON line": ["bad.jsonl", "line 3", "JSON"],
    "JSON list": ["list.jsonl", "line 2", "list"],
    "mixed types": ["'text'", "row 2", "list", "--text_column_name"],
    "numbers": ["n, m", "words", "--text_column_name"],
    "latin-1": ["latin.txt", "line 2", "UTF-8"],
    "parquet": ["fake.parquet", "not a parquet file"],
    "cut gzip": ["cut.txt.gz", "truncated or damaged"],
    "missing column": ["--text_column_name", "text", "a, b"],
    "kinds": ["--train_file", "different kinds", "text", "csv"],
    "delimiter": ["--csv_delimiter", "tiny.txt"],
    "hub and file": ["--dataset_name", "--train_file"],
    "no such dataset": ["--dataset_name", "nobody/nothing"],
    "zero blocks": ["train", "tokens", "128", "--block_size"],
    "block size 0": ["--block_size 0"],
    "block size -5": ["--block_size -5"],
    "split 0": ["--validation_split_percentage 0", "1-99"],
    "split 100": ["--validation_split_percentage 100", "between 0 and 99"],
    "max samples 0": ["--max_train_samples 0"],
    "overrides with a model": ["--config_overrides", "--model_name_or_path"],
    "overrides unknown": ["--config_overrides", "n_layers", "n_layer"],
    "overrides type": ["--config_overrides", "n_layer", "int", "two"],
    "overrides form": ["--config_overrides", "key=value"],
    "model type": ["--model_type gtp2", "gpt2"],
    "no model": ["--model_name_or_path", "--model_type"],
    "no such model": ["--model_name_or_path nobody/nothing"],
    "no tokenizer": ["--tokenizer_name"],
    "no such tokenizer": ["--tokenizer_name", "notes"],
    "frozen vocabulary": ["vocab_size=100", "512"],
    "streaming": ["--streaming", "--max_steps"],
    "no card": ["--use_habana", "--use_cpu"],
    "no Gaudi": ["--use_habana", "GAUDI_SIMULATOR", "--use_cpu"],
    "not a boolean": ["--use_habana", "perhaps"],
    "full directory": ["--output_dir", "full", "--overwrite_output_dir"],
    "no checkpoint": ["--resume_from_checkpoint", "notes"],
    "name too long": ["xxx", "File name too long"],
    "unknown flag": ["--blok_size", "--block_size"],
    "stray word": ["oops"],
    "not a number": ["--block_size", "many"],
    "nothing to do": ["--do_train", "--do_eval"],
    "config missing": ["nowhere.json"],
    "config broken JSON": ["broken.json", "line 2"],
    "config broken YAML": ["broken.yaml", "line"],
    "config list": ["list.yaml", "list"],
    "config key": ["unknown.json", "--model_typo", "--model_type"],
    "no validation": ["--validation_split_percentage"],
    "gaudi config": ["--use_habana", "GAUDI_SIMULATOR"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WORDS)
def test_one_clear_line(outcomes, case):
    code, stderr = outcomes[case]
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2, stderr
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    assert stderr.splitlines()[-1] == lines[0], "the error is the last line"
    for word in WORDS[case]:
        assert word in lines[0]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG])
def test_a_path_that_may_not_be_looked_at_is_one_line(number, capsys):
    """As in the home of another user; root, as whom tests may run, may look everywhere."""
    with pytest.raises(SystemExit, match="2"), user_errors():
        raise OSError(number, os.strerror(number), "/home/other/model")
    assert capsys.readouterr().err == f"error: /home/other/model: {os.strerror(number)}\n"
    with pytest.raises(PermissionError), user_errors():  # no path: a port, perhaps
        raise PermissionError(errno.EACCES, "denied")


@pytest.mark.parametrize(
    "text",
    [
        "[Rank:0] FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::4294967296 (4096)MB\nframe #0: ...",
        "[enforce fail at alloc_cpu.cpp:131] . DefaultCPUAllocator: can't allocate memory: tried to get 9 bytes",
    ],
)
def test_no_memory_is_one_line_of_its_rank(text, capsys, monkeypatch):
    """As a Gaudi and the host report it; the other ranks may have enough."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="1"), user_errors(), memory_errors():
        raise RuntimeError(text)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: rank 1: out of memory: {text.splitlines()[0]}; --dry_run shows"), line
    with pytest.raises(RuntimeError, match="other"), user_errors(), memory_errors():
        raise RuntimeError("an other one")


@pytest.mark.parametrize("error", [UserError("x"), OSError(errno.EACCES, "denied", "x"), KeyboardInterrupt()])
def test_a_line_is_written_in_one_piece(error, monkeypatch):
    """Ranks share a terminal: what one writes in two parts stands in the line of another."""
    written = io.StringIO()
    written.write = Mock()
    monkeypatch.setattr(sys, "stderr", written)
    with pytest.raises(SystemExit), user_errors():
        raise error
    warn("x")
    assert [call.args[0].count("\n") for call in written.write.call_args_list] == [1, 1]


def test_nobody_reads_errors(monkeypatch):
    """With ``2>&-`` a warning ended the run, and a mistake had the exit code of a traceback."""
    monkeypatch.setattr(sys, "stderr", None)
    warn("x")
    with pytest.raises(SystemExit) as end, user_errors():
        raise UserError("x")
    assert end.value.code == UserError.status


def test_every_case_is_checked():
    """The table of flags and the table of words name the same cases."""
    source = Path(__file__).read_text()
    for case in WORDS:
        assert source.count(f'"{case}": ') == 2, case


def test_a_card_that_is_not_there_is_refused_at_once(tmp_path):
    """Before torch is imported, by a real process."""
    result = run("run_clm.py", "--use_habana", "--do_train", "--output_dir", tmp_path / "out", code=2, fresh=True)
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert "GAUDI_SIMULATOR=1" in result.stderr and "--use_cpu" in result.stderr
    result = run("run_clm.py", "--use_habana", env={"GAUDI_SIMULATOR": "none"}, code=2, fresh=True)
    assert "GAUDI_SIMULATOR is 'none'" in result.stderr
    result = run(
        "run_clm.py",
        "--use_habana",
        "--use_lazy_mode",
        env={"GAUDI_SIMULATOR": "1", "PT_HPU_LAZY_MODE": "0"},
        code=2,
        fresh=True,
    )
    assert "--use_lazy_mode True contradicts PT_HPU_LAZY_MODE=0" in result.stderr


def test_a_real_card_wins(tmp_path):
    """With a real habana_frameworks the stand-in stays away, and asking for simulated cards is an error."""
    (tmp_path / "habana_frameworks").mkdir()
    (tmp_path / "habana_frameworks" / "__init__.py").write_text("")
    plugin = "habana_torch_plugin-1.24.0.dist-info"
    shutil.copytree(Path(gaudi_simulator.STAND_IN, plugin), tmp_path / plugin)
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import os, sys\nfrom gaudi_lm.device import choose_card\nchoose_card(sys.argv[1:])\n"
        "import habana_frameworks\nprint(habana_frameworks.__file__)\nprint(os.environ.get('PT_HPU_LAZY_MODE'))\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = run(probe, "--use_habana", "--use_lazy_mode", env={"PYTHONPATH": paths}, fresh=True)
    assert result.stdout.splitlines() == [str(tmp_path / "habana_frameworks" / "__init__.py"), "1"]
    result = run(probe, "--use_habana", env={"PYTHONPATH": paths, "GAUDI_SIMULATOR": "1"}, code=2, fresh=True)
    assert "real habana_frameworks" in result.stderr

"""Every flag: accepted, with the default that users know, explained, and read by something."""

import argparse
import ast
import dataclasses
import re
import subprocess
import sys

import pytest
from documentation import REPOSITORY, read_pages
from running import ROOT, documented_flags, help_flags, load_script, run

SCRIPTS = ("run_clm.py", "run_mlm.py", "run_lora_clm.py")


def caught_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a script, with its dataclasses as ``types``, caught where its main function makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py"])
        patch.syspath_prepend(str(ROOT))
        script = load_script(name)
        caught: list = []

        def catch(argv, *types):
            from gaudi_lm.arguments.parsing import build_parser

            caught.append(build_parser(*types))
            caught[0].types = types
            raise SystemExit

        patch.setattr(script, "parse", catch)
        with pytest.raises(SystemExit):
            script.main([])
    return caught[0]


@pytest.fixture(scope="module", params=SCRIPTS)
def parser(request) -> tuple[str, argparse.ArgumentParser]:
    """A script's name and its parser."""
    return request.param, caught_parser(request.param.removesuffix(".py"))


def test_defaults_are_those_that_users_know(parser):
    script, built = parser
    # A flag that is on by default has a second action, --no_..., of the same destination.
    actions = {option.removeprefix("--"): action for action in built._actions for option in action.option_strings}
    for flag, default in documented_flags(script.removesuffix(".py")).items():
        assert flag in actions, f"{script} lacks --{flag}"
        assert str(actions[flag].default) == default, flag
    for flag in ("low_cpu_mem_usage", "eval_strategy", "streaming"):
        assert flag in actions


def test_every_flag_is_explained(parser):
    _, built = parser
    for action in built._actions:
        assert action.help and len(action.help.split()) >= 2, action.option_strings


def test_every_flag_of_ours_is_read(parser):
    """A flag that no line of code reads would be ignored in silence."""
    from optimum.habana import GaudiTrainingArguments

    _, built = parser
    upstream = {field.name for field in dataclasses.fields(GaudiTrainingArguments)}
    read = set()
    for file in [*ROOT.glob("gaudi_lm/**/*.py"), *ROOT.glob("run_*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            # Flags that are read by a computed name stand in the code as words.
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.update(word.removeprefix("--") for word in node.value.split())
    for kind in built.types:
        for field in dataclasses.fields(kind):
            if field.name not in upstream:
                assert field.name in read, f"nothing reads --{field.name}"


def test_every_flag_of_ours_is_documented(parser):
    """docs/flags.md has a row for each flag that a script adds to those of the libraries, with its default."""
    from optimum.habana import GaudiTrainingArguments

    _, built = parser
    upstream = {field.name for field in dataclasses.fields(GaudiTrainingArguments)}
    rows = [line for line in (REPOSITORY / "docs" / "flags.md").read_text().splitlines() if line.startswith("| `--")]
    listed = {flag: row.split("|")[2] for row in rows for flag in re.findall(r"`--(\w+)`", row.split("|")[1])}
    for kind in built.types:
        for field in dataclasses.fields(kind):
            if field.name not in upstream or field.name in vars(kind).get("__annotations__", {}):
                assert field.name in listed, f"docs/flags.md has no row for --{field.name}"
                if isinstance(field.default, int | float):
                    assert str(field.default) in listed[field.name], field.name


# Old names, which are taken but not listed by --help, and options of other launchers.
UNLISTED = {
    *("--evaluation_strategy", "--no_cuda"),
    *("--nproc_per_node", "--multi_gpu", "--num_processes", "--num_gpus", "--bind_cores_to_rank"),
}


def launcher_flags() -> set[str]:
    launcher = [sys.executable, ROOT / "gaudi_spawn.py", "--help"]
    shown = subprocess.run(launcher, capture_output=True, text=True, check=True).stdout
    return help_flags(shown.partition("\noptions:\n")[2])


def test_every_option_of_the_launcher_is_documented():
    page = (REPOSITORY / "docs" / "many_hosts.md").read_text()
    rows = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `--"))
    assert launcher_flags() - {"--help"} == help_flags(rows)


def test_flags_in_the_documentation_exist():
    known = set(UNLISTED)
    for name in SCRIPTS:
        for action in caught_parser(name.removesuffix(".py"))._actions:
            known.update(action.option_strings)
    known |= launcher_flags()
    known.add("--max_seq_len")  # a beginning that people type, and a documented command too
    # With an underscore: options of docker, pip and sbatch have dashes.
    assert set(re.findall(r"(?<![\w-])--[a-z]+_\w+", read_pages())) - known == set()


@pytest.mark.slow
@pytest.mark.parametrize("script", [*SCRIPTS, "gaudi_spawn.py"])
def test_help_on_any_host(script, tmp_path):
    result = run(ROOT / script, "--help", cwd=tmp_path, fresh=True)
    assert result.stderr == ""
    flags = help_flags(result.stdout)
    if script != "gaudi_spawn.py":
        assert {f"--{flag}" for flag in documented_flags(script.removesuffix(".py"))} <= flags
        text = " ".join(result.stdout.split())
        for flag, default in (
            ("learning_rate", "5e-05"),
            ("seed", "42"),
            ("report_to", "none"),
            ("do_train", "False"),
        ):
            assert f"(default: {default})" in re.search(rf" --{flag} (.*?) --\w+ ", text)[1], flag
    else:
        assert {"--world_size", "--use_mpi", "--use_deepspeed", "--hostfile", "--master_port"} <= flags

"""What a user sees first: nothing that only the libraries have to say, and a help text in groups."""

import inspect
import json
import re
import subprocess
import sys

import pytest
from optimum.habana.utils import environment as optimum_environment
from optimum.habana.utils import misc
from running import ROOT, environment, run
from simulator.cards import card_environment

SCRIPTS = {
    "run_clm.py": ["model", "data", "this script", "training"],
    "run_mlm.py": ["model", "data", "this script", "training"],
    "run_lora_clm.py": ["model", "data", "this script", "adapter", "training"],
}
LIBRARIES = ["Gaudi (optimum-habana)", "training (transformers)"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_in_groups_and_names_each_flag_once(script):
    result = run(ROOT / script, "--help", fresh=True)
    assert result.stderr == ""
    first, _, rest = result.stdout.partition("\n\n")
    assert first == f"usage: {script} [FILE] [FLAGS]"
    headings = re.findall(r"^(\S.*):$", rest, re.MULTILINE)
    assert headings[0] == "options" and headings[-2:] == LIBRARIES
    assert set(SCRIPTS[script]) <= set(headings[1:-2])
    of_data = rest.partition("\ndata:\n")[2].partition(":\n")[0]
    assert "--train_file" in of_data and "--learning_rate" not in of_data
    flags = re.findall(r"^  (--\S+)", rest, re.MULTILINE)
    assert len(flags) == len(set(flags)) > 100
    assert not [flag for flag in flags if "-" in flag.removeprefix("--")], "one spelling is shown"
    assert not re.search(r"^  --\w+.*, --", rest, re.MULTILINE)
    assert "--use_fast_tokenizer" in flags and "--no_use_fast_tokenizer" not in flags


def test_an_error_is_all_that_is_printed(tmp_path):
    result = run("run_clm.py", "--use_cpu", "--output_dir", tmp_path / "out", code=2, fresh=True)
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("card", ["CPU", "simulated"])
def test_a_run_prints_only_its_own_log(card, assets, tmp_path):
    chosen = ["--use_cpu"] if card == "CPU" else ["--use_habana", "--use_lazy_mode"]
    result = run(
        "run_clm.py", "--model_name_or_path", assets.gpt2, "--train_file", assets.train, "--block_size", 32,
        "--max_train_samples", 16, "--max_steps", 2, "--do_train", *chosen, "--output_dir", tmp_path / "out",
        env={} if card == "CPU" else card_environment(), fresh=True,
    )  # fmt: skip
    said = result.stderr.splitlines()
    assert card == "CPU" or said.pop(0).startswith("SIMULATED GAUDI: 1 card in host memory. ")
    odd = [line for line in said if not re.match(r"\d\d:\d\d:\d\d (INFO|WARNING) ", line)]
    assert not odd
    assert not [line for line in result.stdout.splitlines() if not re.match(r"\{'\w+': |\*+ |  \w+ +=|$", line)]


STARTED = """
import atexit, runpy, sys
left_out = ("sklearn", "mlflow", "torch._inductor.ir", "torch._inductor.lowering")
read = []
atexit.register(lambda: print(len(read), [name for name in left_out if name in sys.modules]))
sys.addaudithook(lambda event, about: event == "subprocess.Popen" and print("started", about[1], flush=True))
sys.addaudithook(lambda event, about: event == "open" and "/modeling_zoedepth.py" in str(about[0]) and read.append(1))
sys.argv = ["run_clm.py", "--use_habana", "--output_dir", "out", "--train_file", "missing.txt", "--do_train"]
runpy.run_path("run_clm.py", run_name="__main__")
"""


@pytest.mark.slow
def test_no_pip_is_asked(tmp_path):
    """optimum-habana asks it for a version, on import and with its models: seconds in each of the ranks."""
    answer = subprocess.run(
        [sys.executable, "-c", STARTED], cwd=ROOT, env=environment(**card_environment()), text=True,
        capture_output=True, timeout=280, check=False,
    )  # fmt: skip
    assert answer.returncode == 2, answer.stderr
    started = [line for line in answer.stdout.splitlines() if line.startswith("started")]
    assert any("hl-smi" in line for line in started), "the hook sees what optimum-habana starts"
    assert not [line for line in started if "pip " in line]
    assert answer.stdout.splitlines()[-1] == "1 []", "models are read twice, or what no run needs is imported"
    for asked, way in ((misc.get_habana_frameworks_version, "pip list"), (optimum_environment.get_build, "pip show")):
        assert way in inspect.getsource(asked), "the library has another way now: drop answers_without_pip"


IMPORTED = """
import atexit, json, runpy, sys
atexit.register(lambda: print(json.dumps(list(sys.modules))))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("run_clm.py", ["--help"]),
        ("run_mlm.py", ["--use_cpu", "--nonsense"]),
        ("run_lora_clm.py", ["--use_cpu", "--learning_rate", "fast"]),
    ],
)
def test_a_wrong_flag_does_not_wait_for_imports(script, flags):
    """Of the libraries it takes what reads flags; trainers, datasets and models come after."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, script, *flags], cwd=ROOT, env=environment(), text=True,
        capture_output=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == (0 if flags == ["--help"] else 2), done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "optimum.habana.transformers.training_args" in imported
    assert not imported & {
        "transformers.trainer",
        "transformers.modeling_utils",
        "datasets",
        "peft",
        "sklearn",
        "scipy",
    }


@pytest.mark.slow
@pytest.mark.parametrize("card", ["cpu", "card"])
def test_a_run_imports_no_library_for_other_tasks(assets, tmp_path, card):
    flags = ["--do_train", "--max_steps", 1, "--train_file", assets.train, "--model_name_or_path", assets.gpt2]
    flags += ["--block_size", 32, "--use_cpu" if card == "cpu" else "--use_habana", "--output_dir", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, "run_clm.py", *map(str, flags)], cwd=ROOT, text=True, capture_output=True,
        env=environment(**({} if card == "cpu" else card_environment())), timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "transformers.trainer" in imported
    unneeded = {"deepspeed", "sklearn", "scipy.linalg", "mlflow", "torch._inductor.ir", "sentence_transformers"}
    assert not imported & unneeded


OTHER_PROGRAM = """
import os, sys
from gaudi_lm.device import choose_card
choose_card(sys.argv[1:], "run_clm")
print(os.environ.get("DS_ACCELERATOR"), os.environ["TQDM_MININTERVAL"])
"""


@pytest.mark.parametrize("flags", [["--f=/x/kernel.json"], ["missing.json"], ["--use_cpu", "maybe"], ["--use_cpu"]])
def test_the_command_line_of_a_program_that_imports_a_script(flags):
    """It may be of any kind; flags that choose the card are taken. Nor need there be a stream for errors."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", OTHER_PROGRAM, *flags],
        cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.split() == ["cpu" if flags == ["--use_cpu"] else "None", "15"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_knows_whether_it_is_imported(script):
    assert "choose_card(sys.argv[1:], __name__)" in (ROOT / script).read_text()


IN_PARTS = """
import sys
from gaudi_lm.device import choose_card
choose_card(["--use_cpu"])
from optimum.habana.transformers.trainer import GaudiTrainer
assert "sentence_transformers" not in sys.modules
from optimum.habana import utils
assert utils.__name__ == "optimum.habana.utils" and "sentence_transformers" not in sys.modules
import optimum.habana
assert not hasattr(optimum.habana, "__wrapped__") and "sentence_transformers" not in sys.modules
assert optimum.habana.GaudiTrainer is GaudiTrainer and optimum.habana.transformers.GaudiTrainer is GaudiTrainer
assert "sentence_transformers" in sys.modules, "optimum-habana no longer imports it: drop import_in_parts"
assert optimum.habana.SentenceTransformerGaudiTrainer.__mro__ and optimum.habana.__version__
choose_card(["--use_cpu"])
from optimum.habana import GaudiTrainingArguments
from optimum.habana.transformers.training_args import GaudiTrainingArguments as by_module
assert by_module is GaudiTrainingArguments
"""


@pytest.mark.slow
def test_optimum_habana_is_whole_for_whoever_asks():
    subprocess.run([sys.executable, "-c", IN_PARTS], cwd=ROOT, env=environment(), timeout=280, check=True)


LOGGED = """
import logging, sys
sys.argv = ["run_clm.py", "--use_cpu"]
from gaudi_lm.device import choose_card, set_up_logging
choose_card(sys.argv[1:])
import datasets, deepspeed, huggingface_hub, optimum.utils.logging, transformers
optimum.utils.logging.get_logger("optimum.x")
set_up_logging(main_rank=True)
for name in ("gaudi_lm", "transformers.x", "datasets.x", "huggingface_hub.x", "optimum.x", "DeepSpeed"):
    logging.getLogger(name).warning("from %s", name)
    logging.getLogger(name).debug("no fact of %s", name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ci", ["true", None])
def test_each_line_of_a_library_comes_once_in_one_format(ci):
    """Most have handlers of their own; where CI is set, some hand their lines on as well."""
    environ = {name: value for name, value in environment().items() if name != "CI"} | ({"CI": ci} if ci else {})
    done = subprocess.run(
        [sys.executable, "-c", LOGGED], cwd=ROOT, env=environ, text=True, capture_output=True, timeout=280, check=True
    )
    lines = [
        line for line in [*done.stdout.splitlines(), *done.stderr.splitlines()] if "from " in line or "fact" in line
    ]
    assert [re.sub(r"^\d\d:\d\d:\d\d WARNING from ", "", line) for line in lines] == [
        "gaudi_lm", "transformers.x", "datasets.x", "huggingface_hub.x", "optimum.x", "DeepSpeed",
    ]  # fmt: skip

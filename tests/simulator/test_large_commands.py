"""Every command of docs/large_models.md, as it stands there, on 8 simulated cards and offline.

Ranks are started as the launcher's are, with the same variables, but by forking a process that has imported what all
of them import: eight times that costs two cores a minute for each command. The launcher has its own tests, and reads
its part of the commands here.
"""

import math
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cards import card_environment
from documentation import large_commands
from hub.server import Hub
from running import ROOT, losses, results, run_ranks
from safetensors.torch import load_file

from gaudi_lm.launcher.launch import make_parser, parse

COMMANDS = large_commands()
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("heavy"), pytest.mark.timeout(300)]
# Commands whose second epoch is worth a look; the others take one step, or drop out much.
LEARNS = {"lora_llama3_fp8_8_cards", "lora_llama2_70b_fsdp_8_cards", "lora_llama2_70b_fp8_8_cards"}


@pytest.fixture(scope="module")
def large_hub(tmp_path_factory) -> Iterator[Hub]:
    from hub.large_stand_ins import MOVED, write_large_stand_ins

    root = tmp_path_factory.mktemp("large")
    write_large_stand_ins(root)
    with Hub(root, moved=dict(MOVED)) as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


def test_every_command_is_found():
    page = (ROOT / "docs/large_models.md").read_text()
    assert len(COMMANDS) == page.count("```bash") == 12


@pytest.mark.parametrize("name", COMMANDS)
def test_large_command(name: str, large_hub: Hub, home: Path, tmp_path: Path):
    words = shlex.split(COMMANDS[name].replace("\\\n", ""))
    variables = {}
    while match := re.fullmatch(r"(PT_\w+)=(.*)", words[0]):
        variables[match[1]] = match[2]
        del words[0]
    assert words.pop(0) == "python"
    ranks, script = 1, words[0]
    if words[0] == "gaudi_spawn.py":
        options = parse(make_parser(), words[1:])
        assert options.world_size == 8 and options.use_mpi != options.use_deepspeed
        ranks, script, words = options.world_size, options.script, [options.script, *options.arguments]
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    texts = pq.read_table(next((large_hub.root / "datasets/tatsu-lab/alpaca/main/data").iterdir()))["text"].to_pylist()
    for file in ("path_to_train_file", "path_to_validation_file"):
        if file in words:
            (tmp_path / f"{file}.txt").write_text("\n".join(texts))
            words[words.index(file)] = f"{file}.txt"
    offline = {
        key: value for key, value in large_hub.environment(home).items() if key.startswith(("HF_", "http", "HTTP"))
    }
    environment = card_environment(8, **{**offline, "HF_HUB_OFFLINE": "0", "PT_HPU_LAZY_MODE": "1", **variables})
    output = tmp_path / words[words.index("--output_dir") + 1]
    run_ranks(ranks, ROOT / script, *words[1:], env=environment, cwd=tmp_path)
    found = losses(output) if "--logging_steps" in words else []
    figures = results(output)
    assert 0 < figures["train_loss"] < math.inf
    assert ("eval_loss" in figures) == ("--do_eval" in words)
    if name in LEARNS:
        assert len(found) > 1 and found[-1] < found[0] and figures["eval_loss"] < math.inf
    weights = "adapter_model" if script == "run_lora_clm.py" else "model"
    saved = load_file(output / f"{weights}.safetensors")
    trained = [value for name, value in saved.items() if weights == "model" or "lora_B" in name]
    assert trained and all(value.abs().sum() > 0 for value in trained)  # lora_B begins with zeros
    assert (output / "README.md").is_file()
    # The hub's viewer has a host name of its own, which `datasets` makes up from the hub's.
    assert [one for one in large_hub.escapes if "//datasets-server." not in one] == []

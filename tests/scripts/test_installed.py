"""``pip install .`` brings all that a copied script needs: no file of the repository is read when it runs."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from running import ROOT, copy_elsewhere, environment, results

# Written into the fresh environment: every file that Python opens there, also in child processes.
WATCH = """\
import os, sys
log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        os.write(log, os.path.abspath(os.fsencode(arguments[0])) + b"\\n")
sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of an environment that has the requirements, and the suite by ``pip install .`` of a copy."""
    folder = tmp_path_factory.mktemp("installed")
    left_out = shutil.ignore_patterns(".venv", ".git", "build", "output", "__pycache__", "*.egg-info", "tests")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True, timeout=100)
    python = folder / "env" / "bin" / "python"
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    # As a plain path: the editable installation of the repository, a .pth file there, does not count.
    (Path(purelib) / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    pip += ["--no-index", "--no-build-isolation", "--no-compile"]
    subprocess.run(
        [*pip, folder / "source"], check=True, cwd=folder, env=environment(PIP_NO_CACHE_DIR="1"), timeout=200
    )
    shutil.rmtree(folder / "source")
    (Path(purelib) / "sitecustomize.py").write_text(WATCH.format(log=str(folder / "opened")))
    return python


def opened(python: Path, *command: object, cwd: Path, **env: str) -> tuple[set[Path], str]:
    """Which files Python opened while the command ran, and what the command printed."""
    log = python.parents[2] / "opened"
    log.unlink(missing_ok=True)
    result = subprocess.run(
        [python, *map(str, command)], cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr
    return {Path(line) for line in log.read_text(errors="replace").splitlines()}, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("card", [["--use_cpu"], ["--use_habana", "--use_lazy_mode"]], ids=["cpu", "card"])
def test_a_copied_script_needs_no_file_of_the_repository(card, installed, assets, tmp_path):
    script, output = copy_elsewhere("run_clm.py", tmp_path / "elsewhere"), tmp_path / "out"
    on_card = card != ["--use_cpu"]
    files, _ = opened(
        installed, script, "--model_name_or_path", assets.gpt2, "--train_file", assets.train, "--block_size", 32,
        "--max_train_samples", 16, "--max_steps", 2, "--do_train", "--gaudi_config_name", "Habana/gpt2",
        "--output_dir", output, *card, cwd=script.parent, **({"GAUDI_SIMULATOR": "1"} if on_card else {}),
    )  # fmt: skip
    assert results(output)["train_loss"] > 0
    other = {Path(sys.prefix), ROOT / "build"}  # libraries, and where `make` keeps what is cached
    assert not {file for file in files if ROOT in file.parents and not other & {*file.parents}}
    mine = {file.name for file in files if "gaudi_lm" in file.parts or "gaudi_simulator" in file.parts}
    assert any(name.startswith("device.") for name in mine) and any(name.startswith("trainer.") for name in mine)
    if on_card:
        assert {"gaudi_config.json", "device.cpp", "METADATA"} <= mine
        written = json.loads((output / "gaudi_config.json").read_text())
        assert written["use_fused_adam"] and written["use_torch_autocast"], "as in the bundled configuration"


@pytest.mark.slow
def test_the_report_of_an_installed_simulator(installed, tmp_path):
    files, report = opened(installed, "-m", "gaudi_simulator", "--report", cwd=tmp_path)
    assert "Not simulated" in report
    assert not {file for file in files if ROOT / "gaudi_simulator" in file.parents}

"""Several simulated cards at once: collectives under mpirun and torchrun, ZeRO under the launcher of DeepSpeed."""

import subprocess
import sys
from pathlib import Path

import pytest
from cards import card_environment
from ports import reserved_port
from running import ROOT, environment

import gaudi_simulator

RANKS = ROOT / "tests" / "simulator" / "ranks"
BIN = Path(sys.executable).parent


def launch(*command: str | Path, **changes: str) -> str:
    """Standard output of two ranks."""
    env = environment(
        **card_environment(2, **changes),
        PYTHONPATH=gaudi_simulator.STAND_IN,
        MASTER_ADDR="localhost",
        PATH=f"{BIN}:/usr/bin:/bin",
        PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe",
    )
    with reserved_port() as port:
        result = subprocess.run(
            [str(part).replace("PORT", str(port)) for part in command],
            capture_output=True, text=True, env={**env, "MASTER_PORT": str(port)}, timeout=900,
        )  # fmt: skip
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("cards")
@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_collectives(launcher):
    command = {
        "mpirun": [BIN / "mpirun", "--allow-run-as-root", "-np", "2", sys.executable],
        "torchrun": [BIN / "torchrun", "--nproc_per_node", "2", "--master_port", "PORT"],
    }[launcher]
    out = launch(*command, RANKS / "collectives.py")
    assert "rank 0 done" in out and "rank 1 done" in out  # the line ends may mix


@pytest.mark.slow
@pytest.mark.xdist_group("cards")
def test_zero():
    out = launch(BIN / "deepspeed", "--num_gpus", "2", "--master_port", "PORT", RANKS / "zero.py")
    assert "rank 0 done" in out and "rank 1 done" in out


@pytest.mark.slow
@pytest.mark.xdist_group("cards")
def test_under_torch_compile():
    out = launch(
        BIN / "torchrun", "--nproc_per_node", "2", "--master_port", "PORT", RANKS / "compiled.py", PT_HPU_LAZY_MODE="0"
    )
    assert "rank 0 done" in out and "rank 1 done" in out

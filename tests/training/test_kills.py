"""Runs that are killed at random and started again end with the bits of one that was not, log included.

A handful belongs to every test run; ``make stress`` does it many times (STRESS_ROUNDS).
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from resuming import CARD, CPU, batch, essence, script_flags, start
from running import run_interrupted
from simulator.cards import card_environment

pytestmark = [pytest.mark.slow]
ROUNDS = int(os.environ.get("STRESS_ROUNDS", 1))
CASES = [
    ("run_clm.py", 1, CPU),
    ("run_clm.py", 2, CPU),
    ("run_mlm.py", 2, CPU),
    ("run_lora_clm.py", 1, CPU),
    ("run_mlm.py", 1, CARD),
    ("run_lora_clm.py", 2, CARD),
]
if ROUNDS > 1:
    CASES = [
        (script, ranks, card)
        for script in ("run_clm.py", "run_mlm.py", "run_lora_clm.py")
        for ranks in (1, 2)
        for card in (CPU, CARD)
    ]
LONG = ["--max_steps", 24, "--save_steps", 2, "--save_total_limit", 3, "--eval_steps", 6, "--logging_steps", 5]


def killed(script: str, ranks: int, output: Path, flags: list, chance: random.Random) -> list[int]:
    """Run, and kill all ranks at some time after the folder exists; how they ended, 0 where it was too late."""
    flags = [*flags, *batch(ranks), "--output_dir", output]
    env = card_environment(ranks) if "--use_habana" in flags else {}

    def kill(pids: list[int]) -> None:
        deadline = time.monotonic() + 120
        before = {path.name for path in output.glob("*")}
        while {path.name for path in output.glob("*")} <= before and "Z" not in map(state, pids):
            assert time.monotonic() < deadline, "nothing was written"
            time.sleep(0.001)
        time.sleep(chance.choice([0.0, 0.02, 0.1, 0.5]) * chance.random())
        # All of them stop first: one that saw another one die would end with a traceback of a lost connection.
        for number, states in ((signal.SIGSTOP, "TZ"), (signal.SIGKILL, "Z")):
            for pid in pids:
                os.kill(pid, number)
            while not all(state(pid) in states for pid in pids):
                time.sleep(0.001)

    ends = run_interrupted(0 if ranks == 1 else ranks, script, *flags, env=env, meanwhile=kill)
    for end in ends:
        assert end.returncode in (0, -signal.SIGKILL) and "Traceback" not in end.stderr, end.stderr
    return [end.returncode for end in ends]


def state(pid: int) -> str:
    """Z for one that has ended: nobody waits for it until the test has done with it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("script", "ranks", "card"), CASES, ids=lambda value: value[0] if isinstance(value, list) else None
)
def test_killed_at_random(script, ranks, card, assets, masked_assets, instructions, tmp_path):
    seed = int(os.environ.get("STRESS_SEED", 1))
    chance = random.Random(f"{seed} {script} {ranks} {card}")
    flags = [*script_flags(script, assets, masked_assets, instructions), *LONG, *card]
    start(script, ranks, tmp_path / "whole", *flags)
    whole = essence(tmp_path / "whole")
    kills = 0
    for attempt in range(ROUNDS):
        output = tmp_path / f"out{attempt}"
        for _ in range(3):
            kills += any(killed(script, ranks, output, flags, chance))
        start(script, ranks, output, *flags)
        assert essence(output) == whole
        assert not list(output.glob("incomplete-*")) and not (output / "complete-files").exists()
    assert kills >= ROUNDS

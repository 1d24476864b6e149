"""A disk that gets full: one line, nothing half-written, and the next start resumes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from resuming import CPU, batch, script_flags, start
from running import ROOT, environment, run_interrupted

pytestmark = [pytest.mark.slow]
# Kilobytes: before the first checkpoint, within each file of each checkpoint, within the results.
SIZES = range(20, 1000, 10) if int(os.environ.get("STRESS_ROUNDS", 1)) > 1 else [20, 100, 200, 300, 450, 600, 700, 900]


def test_every_size(assets, masked_assets, instructions, tmp_path):
    flags = [*script_flags("run_clm.py", assets, masked_assets, instructions), *CPU, *batch(1)]
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, ROOT / "tests/support/full_disk.py",
         tmp_path / "disk", json.dumps(list(SIZES)), *map(str, flags)],
        env=environment(), capture_output=True, text=True, timeout=280 if len(SIZES) < 20 else 3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    failed_at, weights = set(), set()
    for end in json.loads(done.stdout):
        status, text = end["first"]
        assert "Traceback" not in text, text
        assert not [name for name in end["left"] if "incomplete" in name or "complete-files" in name]
        if status:
            assert status == 1
            line = text.rstrip().splitlines()[-1]
            assert re.fullmatch(
                rf"error: {tmp_path}/disk/out: (checkpoint-\d|the results) could not be written \(.*\): "
                r"about [\d.]+ MB are needed, [\d.]+ MB are free; .*",
                line,
            )
            complete = [name.removeprefix("out/") for name in end["left"] if re.fullmatch(r"out/checkpoint-\d", name)]
            last = max(complete, default=None)
            assert (f"{last} is intact" if last else "no checkpoint is complete yet") in line
            failed_at.add(re.search("checkpoint-[368]|results", line)[0])
            assert end["second"][0] == 0, end["second"][1]
            if last:
                assert f"Resuming from {tmp_path}/disk/out/{last}" in end["second"][1]
        weights.add(end["weights"])
    assert failed_at == {"checkpoint-3", "checkpoint-6", "checkpoint-8", "results"}
    assert len(weights) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_limit_of_the_size_of_files(ranks, assets, masked_assets, instructions, tmp_path):
    """One rank cannot write, and all of them end."""
    flags = script_flags("run_clm.py", assets, masked_assets, instructions)
    flags[flags.index("--config_overrides") + 1] = "n_embd=64,n_layer=1,n_head=2,n_positions=64"
    flags += [*CPU, *batch(ranks), "--output_dir", tmp_path / "out"]
    limited = tmp_path / "limited.py"
    limited.write_text(
        "import resource, runpy\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        f"runpy.run_path({str(ROOT / 'run_clm.py')!r}, run_name='__main__')\n"
    )
    ends = run_interrupted(0 if ranks == 1 else ranks, limited, *flags, meanwhile=lambda pids: None)
    assert [end.returncode for end in ends] == [1] * ranks, ends[0].stderr
    for end in ends:
        assert "Traceback" not in end.stderr
        assert "checkpoint-3 could not be written (File too large)" in end.stderr.splitlines()[-1]
    assert not list(Path(tmp_path / "out").iterdir())
    start("run_clm.py", ranks, tmp_path / "out", *flags)

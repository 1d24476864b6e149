"""Signals to the launcher, at any time: no rank survives, and no interrupted job is a success.

``make stress`` sets STRESS_ROUNDS to 20: that many launches for each backend and signal.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.spawning import BACKENDS, RANKS, ROOT, Launch, last_line, log_of

ACT, SAVING = str(RANKS / "act.py"), str(RANKS / "saving.py")
ROUNDS = int(os.environ.get("STRESS_ROUNDS", "2"))
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
GRACE = 2.0
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("launcher")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("round_", range(ROUNDS // 2))
def test_running_jobs(backend, deaf, round_, tmp_path):
    """Each signal to a job of its own; the jobs run side by side, do not disturb one another, and leave no files."""
    jobs, places, grace = {}, {}, GRACE if deaf else 100.0  # as eight ranks may take their time
    for number in SIGNALS:
        options = ["--world_size", "2", "--grace", str(grace), "--log_dir", str(tmp_path / number.name)]
        places[number] = tmp_path / f"{number.name} files"
        places[number].mkdir()
        environ = {"TMPDIR": str(places[number])}
        words = [ACT, "0", "wait", *(["deaf"] if deaf else [])]
        jobs[number] = Launch(*BACKENDS[backend], *options, *words, environ=environ)
    deadline = time.monotonic() + 120
    for number, job in jobs.items():
        while any("is here" not in log_of(tmp_path / number.name, rank) for rank in range(2)):
            assert job.process.poll() is None, job.finish().stderr
            assert time.monotonic() < deadline, f"{number.name} shows no rank: {job.survivors()}"
            time.sleep(0.05)
    for number, job in jobs.items():
        assert job.process.poll() is None
        assert [path.name.startswith("gaudi_spawn-") for path in places[number].iterdir()] == [True]
        job.process.send_signal(number)
    for number, job in jobs.items():
        done = job.finish()
        assert job.survivors(GRACE + 20.0) == []
        assert list(places[number].iterdir()) == []
        if number == signal.SIGKILL:
            assert done.returncode == -signal.SIGKILL
            continue
        assert done.returncode == 128 + number
        assert last_line(done).startswith(f"gaudi_spawn: stopped by {number.name}")
        assert ("killed at the end of the grace" in last_line(done)) == deaf
        for rank in range(2):
            assert (f"rank {rank} got {number.name}" in log_of(tmp_path / number.name, rank)) != deaf


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("round_", range(ROUNDS // 2))
def test_starting_jobs(backend, round_):
    """The same while the backend starts: each job is stopped somewhat later than the one before."""
    jobs = [(number, Launch(*BACKENDS[backend], "--grace", str(GRACE), ACT, "0", "wait")) for number in SIGNALS * 2]
    for _, job in jobs:
        assert b"command: " in job.process.stderr.readline()
    begun = time.monotonic()
    for step, (number, job) in enumerate(jobs):
        time.sleep(max(0.0, begun + step * 0.45 - time.monotonic()))
        job.process.send_signal(number)
    for number, job in jobs:
        done = job.finish()
        assert job.survivors(GRACE + 5.0) == []
        assert done.returncode == (-number if number == signal.SIGKILL else 128 + number)


SWALLOWED = (b"ignored in: <function _get_module_lock", b"Failed checking if argv[0] is an import path entry")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_before_anything_is_started(number):
    """While Python starts and modules are imported, and just after: never a success, and nothing is left."""
    # Before our first line, Python itself answers Ctrl-C with status 1.
    statuses = (-number, 128 + number, 1) if number == signal.SIGINT else (-number, 128 + number)
    for step in range(12):
        job = Launch("--use_mpi", "--grace", str(GRACE), ACT, "0", "wait")
        time.sleep(step * 0.025)
        job.process.send_signal(number)
        try:
            job.process.communicate(timeout=30)
        except subprocess.TimeoutExpired as waited:
            # While Python starts, before our first line, it may swallow Ctrl-C, and says so: 1 in 600.
            assert number == signal.SIGINT and any(words in (waited.stderr or b"") for words in SWALLOWED)
            job.process.send_signal(number)
            job.finish()
        assert job.process.returncode in statuses
        assert job.survivors(GRACE + 5.0) == []


def test_a_launcher_that_is_killed_while_it_starts_the_job_leaves_nothing(tmp_path):
    for step in range(12):
        job = Launch("--use_mpi", "--grace", str(GRACE), ACT, "0", "wait", environ={"TMPDIR": str(tmp_path)})
        job.process.stderr.readline()  # "command: " of the supervisor, which then starts the job
        time.sleep(step % 4 * 0.0005)
        job.process.kill()
        assert job.finish().returncode == -signal.SIGKILL
        assert job.survivors(GRACE + 5.0) == []
        assert list(tmp_path.iterdir()) == []


def test_a_second_ctrl_c_does_not_wait():
    job = Launch("--use_mpi", "--world_size", "2", "--grace", "100", ACT, "0", "wait", "deaf")
    job.wait_for(b"is here", lines=2)
    job.process.send_signal(signal.SIGINT)
    job.wait_for_error(b"SIGINT: passed on to all ranks; 100 s to end")
    time.sleep(0.5)
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGINT)
    assert job.finish(60).returncode == 130
    assert job.survivors(5.0) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_save_though_nobody_reads_what_they_print(backend, tmp_path):
    """Ctrl-C ends a `tee` behind the launcher as well, and mpirun would end the ranks for want of a reader."""
    job = Launch(*BACKENDS[backend], "--world_size", "2", SAVING, str(tmp_path), stderr=subprocess.STDOUT)
    job.wait_for(b"is here", lines=2)
    job.process.stdout.close()
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(60) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    assert job.survivors(5.0) == []


def test_output_is_held_open_once():
    """However often Ctrl-C comes; otherwise the launcher had no file left to end with."""
    code = "import os; from gaudi_lm.host import hold_output\n" + (
        "print(*{hold_output() or len(os.listdir('/proc/self/fd')) for _ in range(3)})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_up_to_the_very_end(number, tmp_path):
    """Ctrl-C that is held down: no traceback, and no file that is left."""
    for _ in range(4):
        job = Launch("--use_mpi", "--grace", "1", ACT, "0", "wait", environ={"TMPDIR": str(tmp_path)})
        job.wait_for(b"is here")
        while job.process.poll() is None:
            job.process.send_signal(number)
            time.sleep(0.002)
        assert job.process.returncode in (-number, 128 + number)  # Python's own end heeds none
        done = job.finish()
        assert last_line(done).startswith(f"gaudi_spawn: stopped by {number.name}")
        assert list(tmp_path.iterdir()) == []


def test_nohup_is_respected():
    job = Launch("--use_mpi", "--world_size", "2", ACT, "0", "wait", inside=["nohup"])
    job.wait_for(b"rank 0 is here")
    job.process.send_signal(signal.SIGHUP)
    time.sleep(1.0)
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGTERM)
    assert job.finish().returncode == 143
    assert job.survivors(5.0) == []


def test_a_killed_mpirun_leaves_no_files(tmp_path):
    """What it leaves in a common folder would keep a later mpirun with the same process id from starting."""
    job = Launch("--use_mpi", "--grace", "100", ACT, "0", "wait", environ={"TMPDIR": str(tmp_path)})
    job.wait_for(b"rank 0 is here")
    below = psutil.Process(job.process.pid).children(recursive=True)
    places = [
        process.environ().get("PMIX_SERVER_TMPDIR") for process in below if process.cmdline()[-1:] == ["rank.main"]
    ]
    [server] = filter(None, places)
    assert Path(server).is_relative_to(tmp_path) and any(Path(server).iterdir())
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may end with the one above it
            process.kill()
    job.finish()
    assert list(tmp_path.iterdir()) == []


def test_what_ranks_say_last_is_printed():
    """By mpirun, which may get no processor meanwhile: it was killed once the ranks were gone."""
    job = Launch("--use_mpi", "--world_size", "2", "--grace", "100", ACT, "0", "wait")
    job.wait_for(b"is here", lines=2)
    below = psutil.Process(job.process.pid).children(recursive=True)
    [mpirun] = [process for process in below if process.name() == "prterun"]
    scripts = [process for process in below if process.cmdline()[1:3] == ["-u", ACT]]
    mpirun.suspend()
    job.process.send_signal(signal.SIGINT)
    assert len(scripts) == 2 and not psutil.wait_procs(scripts, timeout=60)[1]
    time.sleep(0.5)
    mpirun.resume()
    done = job.finish()
    assert done.returncode == 130
    assert [f"rank {rank} got SIGINT" in done.stdout for rank in range(2)] == [True, True]


def test_ranks_that_end_in_time_were_not_killed():
    """Though their backend was: it may take longer than they do."""
    job = Launch("--use_mpi", "--world_size", "2", "--grace", "10", ACT, "0", "wait")
    job.wait_for(b"is here", lines=2)
    below = psutil.Process(job.process.pid).children(recursive=True)
    [mpirun] = [process for process in below if process.name() == "prterun"]
    mpirun.suspend()
    job.process.send_signal(signal.SIGINT)
    done = job.finish()
    assert (done.returncode, last_line(done)) == (130, "gaudi_spawn: stopped by SIGINT")


def test_jobs_of_others_are_left_alone():
    """A job of the same script and flags goes on when another one fails and is cleaned up."""
    other = Launch("--use_deepspeed", "--world_size", "2", ACT, "1", "wait")
    other.wait_for(b"rank 0 is here")
    deadline = time.monotonic() + 60
    while str(before := other.survivors()).count("sleep(600)") < 2:  # each rank's own process
        assert time.monotonic() < deadline, before
        time.sleep(0.05)
    failing = Launch("--use_deepspeed", "--world_size", "2", ACT, "1", "exit7")
    assert failing.finish().returncode == 7
    assert other.process.poll() is None
    assert other.survivors() == before
    other.process.send_signal(signal.SIGTERM)
    assert other.finish().returncode == 143
    assert other.survivors(5.0) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_backend_that_is_stopped_from_outside_is_no_success(backend, number):
    """Nor is there anything to send to the launcher: only the backend or the script opens a port."""
    job = Launch(*BACKENDS[backend], "--world_size", "2", "--grace", str(GRACE), ACT, "0", "wait")
    job.wait_for(b"is here", lines=2)  # before that a rank may be seen twice, as its child is a copy at first
    launcher = psutil.Process(job.process.pid)
    [supervisor] = launcher.children()
    [child] = supervisor.children()
    ranks = [one for one in child.children(recursive=True) if one.cmdline()[-1:] == ["rank.main"]]
    assert len(ranks) == 2
    own = [launcher, supervisor, *ranks]
    assert not [found for one in own for found in one.net_connections() if found.status == psutil.CONN_LISTEN]
    child.send_signal(number)
    done = job.finish()
    assert job.survivors(5.0) == []
    assert done.returncode not in (0, 130)
    assert last_line(done).startswith("gaudi_spawn: error: ")


def test_a_background_job_of_a_shell_heeds_ctrl_c():
    """Shells start background jobs with SIGINT ignored; kill -INT must reach the ranks all the same."""
    job = Launch("--use_mpi", "--world_size", "2", ACT, "0", "wait", inside=["env", "--ignore-signal=INT"])
    job.wait_for(b"rank 0 is here")
    job.process.send_signal(signal.SIGINT)
    done = job.finish()
    assert "rank 0 got SIGINT" in done.stdout
    assert done.returncode == 130
    assert job.survivors(5.0) == []


def test_what_starts_the_launcher_may_ignore_or_block_signals():
    """How ranks ended was then unknown, and a killed launcher left them running."""
    inside = ["env", "--ignore-signal=CHLD", "--block-signal"]
    job = Launch("--use_mpi", "--world_size", "2", ACT, "0", "exit7", inside=inside)
    assert job.finish().returncode == 7
    job = Launch("--use_mpi", "--grace", "2", ACT, "0", "wait", inside=inside)
    job.wait_for(b"rank 0 is here")
    job.process.kill()
    job.process.wait()
    assert job.survivors(5.0) == []

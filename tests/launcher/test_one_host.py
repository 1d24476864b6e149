"""Real launches on this host, with all three backends: what reaches the ranks, and how failures end a job."""

import json
import os
import pty
import random
import shlex
import socket
import subprocess
import threading

import pytest
from ports import reserved_port

from gaudi_lm.errors import SAID_VARIABLE
from launcher.spawning import BACKENDS, HOSTILE, OPTIONS, RANKS, Launch, dumped, last_line, log_of, spawn

DUMP, ACT, REFUSE = (str(RANKS / f"{name}.py") for name in ("dump", "act", "refuse"))
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_arguments_environment_and_places(backend, ranks, tmp_path):
    environ = {"HF_TOKEN": "s3cr3t", "PT_X": "a b"}
    options = ["--world_size", str(ranks), "--env", "MY_TEXT=it's\n$HOME", "--log_dir", str(tmp_path / "logs")]
    done = spawn(*BACKENDS[backend], *options, DUMP, *HOSTILE, environ=environ)
    assert done.returncode == 0, done.stderr
    assert "s3cr3t" not in done.stderr
    got = [dumped(log_of(tmp_path / "logs", rank)) for rank in range(ranks)]
    assert all(one["arguments"] == [os.fsencode(word) for word in HOSTILE] for one in got)
    assert sum(map(len, got[0]["arguments"])) > 100_000 - len(HOSTILE)
    places = [
        tuple(int(one["environment"][n]) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        for one in got
    ]
    assert places == [(rank, rank, ranks, ranks) for rank in range(ranks)]
    for name, value in {**environ, "MY_TEXT": "it's\n$HOME", "MASTER_ADDR": "127.0.0.1"}.items():
        assert {one["environment"][name] for one in got} == {value}
    assert len({one["environment"]["MASTER_PORT"] for one in got}) == 1
    assert not any("GAUDI_SPAWN_JOB" in one["environment"] for one in got)
    assert {one["environment"][SAID_VARIABLE] for one in got} == {""}  # each log has the errors of its rank
    allowed = sorted(os.sched_getaffinity(0))
    threads = max(1, len(allowed) // ranks)
    assert {one["environment"]["OMP_NUM_THREADS"] for one in got} == {str(threads)}
    assert all(one["cpus"] == allowed for one in got)


# `make stress` sets STRESS_ROUNDS.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(300 if "STRESS_ROUNDS" in os.environ else 3))
def test_hostile_lists_of_arguments(backend, number):
    """What backends take for their own options wherever it stands, what shells expand, no UTF-8, and 100 kB."""
    draw = random.Random(number)
    words = draw.choices([*OPTIONS, *HOSTILE, "z" * 100_000], k=draw.randrange(1, 40))
    words.insert(0, draw.choice(["--", *OPTIONS]))
    done = spawn(*BACKENDS[backend], DUMP, *words)
    assert done.returncode == 0, done.stderr
    assert dumped(done.stdout)["arguments"] == [os.fsencode(word) for word in words]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_are_bound_to_cores_by_mpirun(ranks):
    allowed = os.sched_getaffinity(0)
    done = spawn("--use_mpi", "--map_by", "slot", "--world_size", str(ranks), DUMP)
    assert done.returncode == 0, done.stderr
    got = [json.loads(line)["cpus"] for line in done.stdout.splitlines()]
    assert all(len(one) == 1 and set(one) <= allowed for one in got)
    assert len(set(map(tuple, got))) == min(ranks, len(allowed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_own_choices_are_kept(backend, tmp_path):
    environ = {"OMP_NUM_THREADS": "7", "RANK": "5", "WORLD_SIZE": "9", "TMPDIR": str(tmp_path)}
    with reserved_port() as port:
        options = ["--master_port", str(port), "--map_by", "none", DUMP]
        done = spawn(*BACKENDS[backend], "--world_size", "2", *options, environ=environ)
    assert done.returncode == 0, done.stderr
    got = dumped(done.stdout)
    assert got["environment"]["MASTER_PORT"] == str(port)
    assert got["environment"]["OMP_NUM_THREADS"] == "7"
    assert got["environment"]["RANK"] in ("0", "1")
    # Neither of the launcher nor of torchelastic, which makes a folder for each job.
    assert list(tmp_path.iterdir()) == []
    assert set(got["cpus"]) == os.sched_getaffinity(0)


@pytest.mark.parametrize("backend", ["mpi", "torch"])
def test_settings_of_a_job_around_do_not_send_ranks_to_its_hosts(backend, tmp_path):
    """Slurm's allocation, the hostfile of an MPIJob, and the options for torchrun of a PyTorchJob."""
    (tmp_path / "hosts").write_text("no-such-host.invalid slots=8\n")
    hosts = f"{socket.gethostname()},no-such-host"
    environ = {"SLURM_JOBID": "7", "SLURM_NODELIST": hosts, "SLURM_JOB_NODELIST": hosts, "SLURM_JOB_NUM_NODES": "2"}
    environ |= {"SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_NNODES": "2", "PET_NNODES": "2"}
    for one in (environ, {"PRTE_MCA_prte_default_hostfile": str(tmp_path / "hosts")}):
        job = Launch(*BACKENDS[backend], "--world_size", "2", DUMP, environ=one)
        done = job.finish()
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"arguments"') == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_all_ranks_refuse_is_printed_once(backend):
    refusal = "error: --train_file texts.txt: not found\n"
    done = spawn(*BACKENDS[backend], "--world_size", "4", REFUSE)
    assert done.returncode == 2 and done.stderr.count(refusal) == 1, done.stderr


def test_fewer_cpus_are_shared_out_as_they_are():
    cpu = min(os.sched_getaffinity(0))
    done = spawn("--use_mpi", "--world_size", "1", DUMP, inside=["taskset", "-c", str(cpu)])
    assert dumped(done.stdout)["cpus"] == [cpu]


@pytest.mark.parametrize("backend", BACKENDS)
def test_shown_command_runs_alone(backend):
    """What `--dry_run` shows is the plain command of the backend, for whoever wants to do without this launcher."""
    with reserved_port() as port:
        options = ["--world_size", "2", "--master_port", str(port), "--dry_run"]
        plan = spawn(*BACKENDS[backend], *options, DUMP, "a b")
        assert plan.returncode == 0
        [command] = [line for line in plan.stdout.splitlines() if line.startswith("command: ")]
        command = command.removeprefix("command: ")
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    name = "OMPI_COMM_WORLD_RANK" if backend == "mpi" else "RANK"
    assert sorted(one["environment"][name] for one in got) == ["0", "1"]
    assert all([bytes.fromhex(word) for word in one["arguments"]] == [b"a b"] for one in got)


def test_dry_run_tells_the_plan_and_hides_secrets(tmp_path):
    (tmp_path / "hosts").write_text("192.0.2.1 slots=8\nme@192.0.2.2 slots=4\n")
    options = ["--hostfile", str(tmp_path / "hosts"), "--use_mpi", "--dry_run", "--log_dir", str(tmp_path / "logs")]
    environ = {"HF_TOKEN": "s3cr3t", "PT_X": "a b", "MY_KEY": "s3cr3t", "OMP_NUM_THREADS": "2"}
    done = spawn(*options, "--env", "MY_KEY", DUMP, "--hub_token", "s3cr3t", environ=environ)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "host: 192.0.2.1 ranks 0-7" in lines
    assert "host: me@192.0.2.2 ranks 8-11" in lines
    assert "environment: PT_X='a b'" in lines
    assert "environment: MY_KEY='***'" in lines
    assert "s3cr3t" not in done.stdout + done.stderr
    [command] = [line for line in lines if line.startswith("command: ")]
    assert shlex.split(command)[-3:] == [DUMP, "--hub_token", "***"]
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("action", "rank", "status", "words"),
    [
        ("exit7", -1, 7, "failed with exit status 7"),
        ("kill", -1, 137, "failed with exit status 137 (SIGKILL)"),
        ("raise", 0, 1, "failed with exit status 1"),
        ("killwatcher", 1, 137, "was killed, exit status 137 (SIGKILL)"),
    ],
)
def test_a_failing_rank_ends_the_job(backend, action, rank, status, words, tmp_path):
    """By its name, though the others fail as well, and nothing is left in the temporary directory."""
    logs, files = tmp_path / "logs", tmp_path / "files"
    files.mkdir()
    options = [*BACKENDS[backend], "--world_size", "2", "--log_dir", str(logs)]
    job = [ACT, str(rank), action, *["deaf", f"together={tmp_path / 'lock'}"] * (action != "raise")]
    done = spawn(*options, *job, environ={"TMPDIR": str(files)})
    chosen = rank % 2
    assert done.returncode == status
    name = f"rank {chosen} on host {socket.gethostname()}"
    place = f"; logs: {logs}" * (action != "killwatcher")
    assert last_line(done) == f"gaudi_spawn: error: {name} {words}{place}"
    log = log_of(logs, chosen)
    assert f"rank {chosen} is here" in log
    assert ("RuntimeError: boom" in log) == (action == "raise")
    assert list(files.iterdir()) == []


@pytest.mark.parametrize("action", ["exit1", "exit7", "kill", "raise", "killwatcher"])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_failing_rank_ends_deaf_ones_too(action, rank):
    job = Launch("--use_mpi", "--world_size", "4", ACT, str(rank), action, "deaf")
    done = job.finish()
    assert job.survivors(1.0) == []
    assert done.returncode == {"exit1": 1, "exit7": 7, "kill": 137, "raise": 1, "killwatcher": 137}[action]
    assert f"rank {rank} on host" in last_line(done)
    # What a killed watcher had read and not passed on yet is lost with it.
    assert action == "killwatcher" or f"rank {rank} is here" in done.stdout


def test_output_of_ranks_goes_to_the_terminal_as_from_a_terminal():
    leader, follower = pty.openpty()
    job = Launch("--world_size", "2", DUMP, stdout=follower, stderr=follower)
    os.close(follower)
    seen = bytearray()

    def read() -> None:
        try:
            while data := os.read(leader, 65536):
                seen.extend(data)
        except OSError:
            return

    reader = threading.Thread(target=read)
    reader.start()
    assert job.process.wait(120) == 0
    reader.join()
    lines = [line for line in seen.decode().splitlines() if line.startswith("{")]
    assert [json.loads(line)["terminal"] for line in lines] == [[True, True]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reader_that_goes_away_stops_the_job(backend):
    job = Launch(*BACKENDS[backend], "--world_size", "2", "--grace", "2", str(RANKS / "chatter.py"))
    job.process.stdout.readline()
    job.process.stdout.close()
    job.process.stderr.close()
    assert job.process.wait(60) not in (0, None)
    assert job.survivors(1.0) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_much_output_arrives_whole_and_apart(backend):
    done = spawn(*BACKENDS[backend], str(RANKS / "chatter.py"), "20000")
    assert done.returncode == 0
    assert [line for line in done.stdout.splitlines() if line.startswith("out")] == [f"out {n}" for n in range(20000)]
    assert [line for line in done.stderr.splitlines() if line.startswith("err")] == [f"err {n}" for n in range(20000)]


def test_two_launches_at_once_both_run():
    jobs = [Launch(*options, "--world_size", "2", DUMP) for options in BACKENDS.values() for _ in range(2)]
    done = [job.finish() for job in jobs]
    assert [one.returncode for one in done] == [0] * 6, [one.stderr for one in done]
    assert len({dumped(one.stdout)["environment"]["MASTER_PORT"] for one in done}) == 6
    assert [job.survivors(1.0) for job in jobs] == [[]] * 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_busy_port_is_an_error(backend):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = spawn(*BACKENDS[backend], "--world_size", "2", "--master_port", str(port), DUMP)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert f"--master_port {port}" in line


def test_simulated_cards():
    script = [DUMP, "--use_habana"]
    done = spawn("--use_mpi", "--world_size", "2", *script, environ={"GAUDI_SIMULATOR": "2"})
    assert done.returncode == 0, done.stderr
    assert dumped(done.stdout)["environment"]["GAUDI_SIMULATOR"] == "2"
    done = spawn("--use_mpi", "--world_size", "4", *script, environ={"GAUDI_SIMULATOR": "2"})
    assert done.returncode == 2
    assert "4 ranks on this host but 2 cards" in done.stderr


def test_a_backend_that_cannot_start_is_shown_and_named(tmp_path):
    # A hook of Python's start-up that breaks torch, as a half installed build would.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libtorch is broken')")
    done = spawn("--world_size", "2", DUMP, environ={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "libtorch is broken" in done.stderr
    assert last_line(done) == "gaudi_spawn: error: torch.distributed ended before the ranks had, with exit status 1"

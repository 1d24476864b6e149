"""Two hosts on one machine, joined by a cable, an sshd in each: DeepSpeed and MPI jobs across both."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from resuming import essence
from running import environment, losses

from launcher.hosts import two_hosts
from launcher.spawning import HOSTILE, OPTIONS, RANKS, ROOT, Launch, clm_flags, dumped, last_line, log_of, spawn

DUMP, ACT, SAVING = (str(RANKS / name) for name in ("dump.py", "act.py", "saving.py"))
BACKENDS = {"mpi": "--use_mpi", "deepspeed": "--use_deepspeed"}
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("hosts")]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_hosts(tmp_path_factory.mktemp("hosts") / "etc") as both:
        yield both


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# rehearsal\nhosta slots=2\nroot@hostb slots=2\r\n")
    return str(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_and_environment_arrive(backend, hosts, hostfile, tmp_path):
    environ = {
        "PT_X": "it's\n$HOME; `id`",
        "HCCL_X": "1",
        "HF_TOKEN": "s3cr3t",
        "HF_HOME": "/h",
        "MY_KEY": "n4m3d",
        "MY_LEFT_OUT": "1",
        "PYTHONPATH": "/a b",
        "OMP_NUM_THREADS": "3",
        "GAUDI_SIMULATOR": "2",
    }
    options = ["--hostfile", hostfile, "--log_dir", str(tmp_path / "logs"), "--env", "MY_KEY"]
    options += ["--env", "MY_TEXT= a=b "]
    job = Launch(BACKENDS[backend], *options, DUMP, *OPTIONS, *HOSTILE, environ=environ, inside=hosts[0].inside())
    commands = []
    while job.process.poll() is None:
        commands += [line for line in job._survivors() if "s3cr3t" in line or "n4m3d" in line]
    done = job.finish()
    assert done.returncode == 0, done.stderr
    assert not commands, "a secret on a command line"
    assert "s3cr3t" not in done.stderr and "n4m3d" not in done.stderr
    got = [dumped(log_of(tmp_path / "logs", rank)) for rank in range(4)]
    assert [one["host"] for one in got] == ["hosta", "hosta", "hostb", "hostb"]
    assert all(one["arguments"] == [os.fsencode(word) for word in [*OPTIONS, *HOSTILE]] for one in got)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    places = [tuple(int(one["environment"][name]) for name in names) for one in got]
    assert places == [(0, 0, 4, 2), (1, 1, 4, 2), (2, 0, 4, 2), (3, 1, 4, 2)]
    for name in ("PT_X", "HCCL_X", "HF_HOME", "MY_KEY", "OMP_NUM_THREADS", "GAUDI_SIMULATOR"):
        assert [one["environment"][name] for one in got] == [environ[name]] * 4
    assert [one["environment"]["MY_TEXT"] for one in got] == [" a=b "] * 4
    assert [one["environment"]["MASTER_ADDR"] for one in got] == [hosts[0].address] * 4
    assert all(one["environment"]["PYTHONPATH"].startswith("/a b:") for one in got)
    for one in got[2:]:
        assert not {"HF_TOKEN", "MY_LEFT_OUT"} & one["environment"].keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_addresses_of_version_6_and_unequal_hosts(backend, hosts, tmp_path):
    path = tmp_path / "hosts"
    path.write_text(f"[{hosts[1].address6}] slots=1\n{hosts[0].address6} slots=2\n")
    options = ["--hostfile", str(path), "--world_size", "3", "--log_dir", str(tmp_path)]
    done = spawn(BACKENDS[backend], *options, DUMP, inside=hosts[0].inside())
    assert done.returncode == 0, done.stderr
    got = [dumped(log_of(tmp_path, rank)) for rank in range(3)]
    assert [one["host"] for one in got] == ["hostb", "hosta", "hosta"]
    assert [one["environment"]["LOCAL_RANK"] for one in got] == ["0", "0", "1"]
    assert {one["environment"]["MASTER_ADDR"] for one in got} == {hosts[1].address6}


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_of_hosts_and_folders_that_mpirun_does_not_take(backend, hosts, tmp_path):
    """Its own host by another name, and a temporary directory with blanks and colons, or with more than ASCII."""
    (tmp_path / "hosts").write_text("HOSTA slots=1\nHostB slots=1\n")
    for name in ("a b:c", "t\u00fcr '\""):
        (place := tmp_path / name).mkdir()
        options = ["--hostfile", str(tmp_path / "hosts"), "--log_dir", str(tmp_path / f"logs {len(name)}")]
        done = spawn(BACKENDS[backend], *options, DUMP, inside=hosts[0].inside(), environ={"TMPDIR": str(place)})
        assert done.returncode == 0, done.stderr
        got = [dumped(log_of(tmp_path / f"logs {len(name)}", rank))["host"] for rank in range(2)]
        assert got == ["hosta", "hostb"]
        assert list(place.iterdir()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_save_on_both_hosts_though_nobody_reads_what_they_print(backend, hosts, tmp_path):
    """And though the other host is done before: mpirun ended all ranks once a host was gone."""
    (tmp_path / "hosts").write_text("hosta slots=1\nhostb slots=1\n")
    (tmp_path / "saved").mkdir()
    options = ["--hostfile", str(tmp_path / "hosts"), SAVING, str(tmp_path / "saved"), "slow"]
    how = {"inside": ["env", *hosts[0].inside()], "stderr": subprocess.STDOUT}
    job = Launch(BACKENDS[backend], *options, **how)
    job.wait_for(b"is here", lines=2)
    job.process.stdout.close()
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(60) == 130
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["0", "1"]


@pytest.mark.parametrize(("backend", "action"), [("mpi", "exit7"), ("mpi", "killwatcher"), ("deepspeed", "exit7")])
def test_the_first_rank_to_fail_is_named_on_whatever_host(backend, action, hosts, hostfile, tmp_path):
    together, before = f"together={tmp_path / 'lock'}", set(Path(tempfile.gettempdir()).glob("prted.*"))
    options = ["--hostfile", hostfile, ACT, "-1", action, "deaf", together]
    done = spawn(BACKENDS[backend], *options, inside=hosts[0].inside())
    assert done.returncode == {"exit7": 7, "killwatcher": 137}[action]
    how = {"exit7": "failed with exit status 7", "killwatcher": "was killed, exit status 137 (SIGKILL)"}[action]
    assert last_line(done).endswith(f"gaudi_spawn: error: rank 3 on host hostb {how}")
    assert "rank 3 is here" in done.stdout
    # With what mpirun leaves of itself there, a later one of the same process id does not start.
    assert set(Path(tempfile.gettempdir()).glob("prted.*")) <= before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_signals_reach_the_other_host(backend, name, hosts, hostfile, tmp_path):
    options = ["--hostfile", hostfile, "--grace", "100", "--log_dir", str(tmp_path)]
    job = Launch(BACKENDS[backend], *options, ACT, "0", "wait", inside=["env", *hosts[0].inside()])
    deadline = time.monotonic() + 120
    while any("is here" not in log_of(tmp_path, rank) for rank in range(4)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.process.send_signal(signal.Signals[name])
    done = job.finish()
    assert job.survivors(20.0) == []
    assert done.returncode == (143 if name == "SIGTERM" else -9)
    assert ("rank 3 got SIGTERM" in log_of(tmp_path, 3)) == (name == "SIGTERM")


@pytest.mark.parametrize("event", ["cable", "sshd"])
def test_a_lost_host_ends_its_jobs_with_its_name(event, tmp_path):
    with two_hosts(tmp_path / "etc") as hosts:
        (tmp_path / "hosts").write_text("hosta slots=2\nhostb slots=2\n")
        options = ["--hostfile", str(tmp_path / "hosts"), "--grace", "2"]
        jobs = [Launch(name, *options, ACT, "0", "wait", inside=hosts[0].inside()) for name in BACKENDS.values()]
        for job in jobs:
            job.wait_for(b"rank 0 is here")
        if event == "cable":
            hosts[1].cable("down")
        else:
            hosts[1].stop_sshd()
        for job in jobs:
            done = job.finish(60)
            assert done.returncode not in (0, None)
            assert "host hostb" in last_line(done)
            # The other host, alone, gives the launcher up as well.
            assert job.survivors(60.0) == []


def test_a_lost_host_is_named_though_mpirun_ends_everything_first(tmp_path):
    """It also kills the process that would tell of the loss, and has exit status 0."""
    with two_hosts(tmp_path / "etc") as hosts:
        (tmp_path / "hosts").write_text("hosta slots=2\nhostb slots=2\n")
        options = ["--use_mpi", "--hostfile", str(tmp_path / "hosts")]
        job = Launch(*options, ACT, "0", "wait", "deaf", inside=hosts[0].inside())
        job.wait_for(b"rank 0 is here")
        below = psutil.Process(job.process.pid).children(recursive=True)
        [connection] = [one for one in below if "supervise.connect" in one.cmdline()]
        connection.suspend()
        hosts[1].stop_sshd()
        done = job.finish(60)
        assert done.returncode == 137
        assert last_line(done).endswith("gaudi_spawn: error: host hostb is lost, or the connection to it was killed")
        assert job.survivors(60.0) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unreachable_host_is_named_at_once(backend, hosts, tmp_path):
    (tmp_path / "hosts").write_text("hosta slots=2\nhostb slots=2\nhostc slots=2\n")
    done = spawn(BACKENDS[backend], "--hostfile", str(tmp_path / "hosts"), DUMP, inside=hosts[0].inside())
    assert done.returncode == 1
    assert last_line(done).startswith("gaudi_spawn: error: host hostc: ")
    assert "command: " not in done.stderr


def test_a_missing_folder_on_the_other_host_is_named(hosts, hostfile, tmp_path):
    here = tmp_path / "only_here"
    here.mkdir()
    (here / "my.py").write_text("print('hello')\n")
    hosts[1].run("mount", "-t", "tmpfs", "none", str(here))
    done = spawn("--use_mpi", "--hostfile", hostfile, str(here / "my.py"), inside=hosts[0].inside())
    assert done.returncode == 1
    assert last_line(done) == f"gaudi_spawn: error: host hostb: {here / 'my.py'}: no such file"


def test_a_setting_that_differs_is_an_error_and_one_that_is_given_is_not(assets, one_rank, tmp_path):
    """Training with MPI, a rank on each host."""
    with two_hosts(tmp_path / "etc", sshd_lines="SetEnv PT_HPU_OTHER=1\n") as hosts:
        (tmp_path / "hosts").write_text("hosta slots=1\nhostb slots=1\n")
        options = ["--hostfile", str(tmp_path / "hosts"), "--use_mpi"]
        script = [str(ROOT / "run_clm.py"), *clm_flags(assets, tmp_path / "out", 4, "--use_habana")]
        how = {"inside": hosts[0].inside(), "environ": environment(GAUDI_SIMULATOR="1")}
        done = spawn(*options, *script, **how)
        assert done.returncode == 2, done.stderr
        error = "error: PT_HPU_OTHER: rank 1 on host hostb has another value than rank 0"
        assert sum(line.startswith(error) for line in done.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()
        done = spawn(*options, "--env", "PT_HPU_OTHER=2", *script, **how)
        assert done.returncode == 0, done.stderr
        assert losses(tmp_path / "out") == pytest.approx(one_rank, abs=1e-5)


def test_training_across_both(hosts, hostfile, assets, one_rank, tmp_path):
    """With DeepSpeed, two ranks on each host."""
    script = [str(ROOT / "run_clm.py"), *clm_flags(assets, tmp_path / "out", 2, "--use_habana")]
    options = ["--hostfile", hostfile, "--world_size", "4", "--use_deepspeed", "--log_dir", str(tmp_path / "logs")]
    done = spawn(*options, *script, environ=environment(GAUDI_SIMULATOR="2"), inside=hosts[0].inside())
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out") == pytest.approx(one_rank, abs=1e-5)


IMPATIENT = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from gaudi_lm.training import rank_settings
rank_settings.SECONDS = 0.5
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def train(hosts, assets, tmp_path):
    """Train on both hosts: ``train(backend, output, *flags)``; the model has dropout, and is saved every 4 steps."""
    (tmp_path / "hosts").write_text("hosta slots=1\nhostb slots=1\n")
    (tmp_path / "impatient.py").write_text(IMPATIENT)

    def run(backend, output, *flags):
        flags = ["--use_habana", "--save_strategy", "steps", "--save_steps", "4", "--report_to", "none", *flags]
        flags += ["--config_overrides", "n_embd=32,n_layer=2,n_head=2,n_positions=64"]
        script = [str(tmp_path / "impatient.py"), str(ROOT / "run_clm.py"), *clm_flags(assets, output, 4, *flags)]
        options = ["--hostfile", str(tmp_path / "hosts"), BACKENDS[backend]]
        return spawn(*options, *script, environ=environment(GAUDI_SIMULATOR="1"), inside=hosts[0].inside())

    return run


@pytest.fixture
def own_disks(hosts, tmp_path):
    """A folder of the same name on both hosts, on a disk of each host's own: the name, and what it is on each."""
    shared, own = tmp_path / "disk", [tmp_path / host.name for host in hosts]
    for folder in (shared, *own):
        folder.mkdir()
    for host, folder in zip(hosts, own, strict=True):
        host.run("mount", "--bind", str(folder), str(shared))
    yield shared, own
    for host in hosts:
        host.run("umount", str(shared))


def test_checkpoints_that_hosts_do_not_share_are_refused(train, own_disks, tmp_path):
    """They would be without what the ranks of the other host write; with a copy for each host, not in one folder."""
    disk, own = own_disks
    for output, flags, words in (
        (disk / "out", [], "rank 1 on host hostb does not see what rank 0 writes there"),
        (tmp_path / "out", ["--save_on_each_node"], "--save_on_each_node: host hostb would write the files of rank 0"),
    ):
        done = train("mpi", output, *flags)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert words in line and done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert [list(folder.iterdir()) for folder in own] == [[], []] and not (tmp_path / "out").exists()


def test_a_copy_of_checkpoints_on_each_host_is_resumed_from(train, own_disks, tmp_path):
    """With the optimizer's parts and the random states of each host's own ranks, and no weights that are empty."""
    disk, own = own_disks
    config = json.loads((ROOT / "configs/deepspeed/zero_3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small weights too are divided
    (tmp_path / "zero.json").write_text(json.dumps(config))
    flags = ["--save_on_each_node", "--deepspeed", str(tmp_path / "zero.json")]
    for output, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        done = train("mpi", disk / output, *flags, "--max_steps", str(steps))
        assert done.returncode == 0, done.stderr
    assert f"Resuming from {disk}/parts/checkpoint-4" in done.stderr and "RNG state" not in done.stderr
    assert essence(own[0] / "parts") == essence(own[0] / "whole")
    assert (own[1] / "parts/checkpoint-8/rng_state_1.pth").is_file()
    # DeepSpeed gathers the weights of ZeRO-3 on rank 0 alone.
    assert len(list(own[0].glob("parts/**/model.safetensors"))) == 3 and not list(own[1].glob("parts/**/model*"))
    shutil.rmtree(own[1] / "parts/checkpoint-8")
    done = train("mpi", disk / "parts", *flags, "--max_steps", "9")
    assert done.returncode == 2 and "rank 1 on host hostb does not see this checkpoint" in done.stderr

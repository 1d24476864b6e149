"""The launcher's pure functions: hostfiles, commands, environments, placement. No backend is started."""

import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import reserved_port

from gaudi_lm import device, host, variables
from gaudi_lm.errors import UserError
from gaudi_lm.launcher import hostfile, launch, plan, processes, supervise
from gaudi_lm.launcher.hostfile import Host
from gaudi_lm.training.rank_settings import digests, disagreement
from launcher.spawning import HOSTILE, OPTIONS, ROOT

# What an argument can hold: any bytes but NUL, as Python shows them.
ARGUMENT = st.one_of(
    st.binary(max_size=20).map(lambda data: os.fsdecode(data.replace(b"\0", b""))),
    st.text(alphabet=":-=$'\"\\ \n;`*", max_size=6),
    st.sampled_from([*HOSTILE, *OPTIONS]),
)
ARGUMENTS = st.lists(ARGUMENT, max_size=8)


PROGRAM = ["the", "rank"]


def make_plan(backend: str, *arguments: str, hosts: tuple[Host, ...] = (Host("here", 2),), **more) -> plan.Plan:
    more = {"local": tuple(index == 0 for index in range(len(hosts))), "mpirun": "/opt/bin/mpirun", **more}
    return plan.Plan(backend, hosts, ("run.py", *arguments), "10.0.0.1", 29511, **more)


def command(backend: str, index: int = 0, **more) -> list[str]:
    return make_plan(backend, **more).command(index, "/job", PROGRAM)


# Hostfiles


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a slots=8\nb slots=4\n", [Host("a", 8), Host("b", 4)]),
        ("# all of them\n\n  a slots=8   # the first\n\t\nb\tslots=8", [Host("a", 8), Host("b", 8)]),
        ("a slots=1\r\nb slots=2\r\n", [Host("a", 1), Host("b", 2)]),
        ("\ufeffa slots=1\n", [Host("a", 1)]),
        (
            "root@10.0.0.1 slots=8\nme.too@gaudi-2.lab slots=8",
            [Host("10.0.0.1", 8, "root"), Host("gaudi-2.lab", 8, "me.too")],
        ),
        (
            "fd00::1 slots=8\n[fd00::2] slots=8\nme@[fd00::3] slots=8",
            [Host("fd00::1", 8), Host("fd00::2", 8), Host("fd00::3", 8, "me")],
        ),
        ("fe80::1%eth0 slots=1\nworker_0 slots=08", [Host("fe80::1%eth0", 1), Host("worker_0", 8)]),
    ],
)
def test_good_hostfiles(text, hosts):
    assert list(hostfile.parse_hostfile(text, "hosts")) == hosts


BAD_HOSTFILES = [
    ("ab] slots=1", "line 1: 'ab]' is neither a host name nor an IP address"),
    ("", "names no host"),
    ("\n\n", "names no host"),
    ("# a slots=8\n", "names no host"),
    ("a\n", "line 1: expected 'HOST slots=N'"),
    ("a slots=8\nb\n", "line 2: expected 'HOST slots=N'"),
    ("# one\n\na slots=8\n\nb 8\n", "line 5: expected 'HOST slots=N'"),
    ("a slots\n", "line 1: expected"),
    ("a slots 8\n", "line 1: expected"),
    ("a slots = 8\n", "line 1: expected"),
    ("a slot=8\n", "line 1: expected"),
    ("a SLOTS=8\n", "line 1: expected"),
    ("slots=8\n", "line 1: expected"),
    ("a slots=8 b slots=8\n", "line 1: expected"),
    ("a slots=8 max_slots=8\n", "line 1: expected"),
    ("a,b slots=8\n", "line 1: 'a,b' is neither"),
    ("a slots=\n", "line 1: slots=:"),
    ("a slots=0\n", "line 1: slots=0:"),
    ("a slots=-1\n", "line 1: slots=-1:"),
    ("a slots=eight\n", "line 1: slots=eight:"),
    ("a slots=8.0\n", "line 1: slots=8.0:"),
    ("a slots=8,\n", "line 1: slots=8,:"),
    ("a slots=\u0668\n", "line 1: slots=\u0668:"),
    ("a slots=99999999999\n", "line 1: slots=99999999999:"),
    ("a slots=8\na slots=8\n", "line 2: host 'a' is already on line 1"),
    ("a slots=8\nA slots=8\n", "line 2: host 'A' is already on line 1"),
    ("a slots=8\nroot@a slots=8\n", "line 2: host 'a' is already on line 1"),
    ("fd00::1 slots=1\n[fd00::1] slots=1\n", "line 2: host 'fd00::1' is already on line 1"),
    ("@a slots=8\n", "line 1: '@a': '' is not a user name"),
    ("root@ slots=8\n", "line 1: 'root@' is neither"),
    ("-oProxyCommand=id slots=8\n", "line 1: '-oProxyCommand=id' is neither"),
    ("-l@a slots=8\n", "line 1: '-l@a': '-l' is not a user name"),
    ("$(id) slots=8\n", "line 1: '$(id)' is neither"),
    ("a;id slots=8\n", "line 1: 'a;id' is neither"),
    ("a:22 slots=8\n", "line 1: 'a:22' is neither"),
    ("10.0.0.999 slots=8\n", "line 1: '10.0.0.999' is neither"),
    ("[fd00::1 slots=8\n", "line 1: '[fd00::1' is neither"),
    ("\u4e3b\u673a slots=8\n", "line 1: '\u4e3b\u673a' is neither"),
]


@pytest.mark.parametrize(("text", "words"), BAD_HOSTFILES)
def test_bad_hostfiles(text, words):
    with pytest.raises(UserError) as error:
        hostfile.parse_hostfile(text, "hosts")
    assert str(error.value).startswith("--hostfile hosts")
    assert words in str(error.value)


NAME = st.from_regex(r"[a-z][a-z0-9-]{0,8}[a-z0-9]", fullmatch=True)


@given(st.dictionaries(NAME, st.tuples(st.integers(1, 999), st.one_of(st.just(""), NAME)), min_size=1), st.data())
def test_hostfile_round_trip(table, data):
    hosts = [Host(name, slots, user) for name, (slots, user) in table.items()]
    noise = st.sampled_from(["", "\n", "# c slots=1\n", " \t\n"])
    end = st.sampled_from(["\n", "\r\n", " # why\n", "  \n"])
    lines = [data.draw(noise) + f"{host.login} slots={host.slots}" + data.draw(end) for host in hosts]
    assert list(hostfile.parse_hostfile("".join(lines), "hosts")) == hosts


def test_places_of_ranks():
    here, others = make_plan("mpi", hosts=(Host("a", 2), Host("b", 3))).orders("/job", PROGRAM)
    places = [(order["job"]["first_rank"], order["job"]["slots"]) for order in (here, *others.values())]
    assert places == [(0, 2), (2, 3)]
    assert {order["job"]["world_size"] for order in (here, *others.values())} == {5}


# Commands


def test_torch_command():
    words = command("torch")
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--nproc_per_node=2", "--master_addr=10.0.0.1", "--master_port=29511", "--log_dir=/job"} <= set(words)
    assert words[-2:] == PROGRAM
    assert {"--log_dir=/logs", "--tee=3"} <= set(command("torch", log_dir="/logs"))


@pytest.mark.parametrize(
    ("version", "words"), [(4, ["--map-by", "slot", "--oversubscribe"]), (5, ["--map-by", "slot:oversubscribe"])]
)
def test_mpi_command_on_one_host(version, words):
    whole = command("mpi", version=version)
    assert whole[0] == "/opt/bin/mpirun" and "-n 2" in shlex.join(whole)
    assert whole[-2:] == PROGRAM
    assert shlex.join(words) in shlex.join(whole)
    assert "--hostfile" not in whole and whole[whole.index("--host") + 1] == "localhost:2"
    assert ("--allow-run-as-root" in whole) == (os.geteuid() == 0)


@pytest.mark.parametrize(
    ("version", "map_by", "words"),
    [
        (5, "socket", "--bind-to package:overload-allowed --map-by package:oversubscribe"),
        (5, "slot", "--bind-to core:overload-allowed --map-by slot:oversubscribe"),
        (5, "none", "--bind-to none"),
        (4, "socket", "--bind-to socket:overload-allowed --map-by socket --oversubscribe"),
    ],
)
def test_mpirun_binds(version, map_by, words):
    assert words in shlex.join(command("mpi", version=version, map_by=map_by))


def test_mpi_on_several_hosts_has_no_variables_on_its_command():
    job = make_plan("mpi", hosts=(Host("a", 2), Host("b", 3, "me")), environ={"PT_X": "value", "MY_TOKEN": "secret"})
    here, others = job.orders("/job", PROGRAM)
    [words] = here["commands"]
    assert words[words.index("--hostfile") + 1] == "/job/hostfile"
    assert not {"value", "secret"} & set(" ".join(words).split())
    for order in (here, others["b"]):
        assert {"PT_X": "value", "MY_TOKEN": "secret", "MASTER_ADDR": "10.0.0.1"}.items() <= order["job"][
            "environ"
        ].items()
    assert others["b"]["login"] == "me@b"


def test_deepspeed_runs_once_on_each_host():
    here, others = make_plan("deepspeed", hosts=(Host("a", 1), Host("b", 2, "me"))).orders("/job", PROGRAM)
    own, connection = here["commands"]
    [other] = others["b"]["commands"]
    assert "--node_rank=0" in own and "--node_rank=1" in other
    assert connection == processes.python("supervise.connect", "/job", "b")
    assert "--bind_cores_to_rank" in command("deepspeed", map_by="socket")
    assert "--enable_each_rank_log=/logs" in command("deepspeed", log_dir="/logs")


@settings(max_examples=300, deadline=None)
@given(ARGUMENTS, st.sampled_from([[], ["--use_mpi"], ["--world_size", "2"], ["--env=A=--", "--grace", "1"]]))
def test_arguments_of_the_script_are_not_looked_at(arguments, options):
    parsed = launch.parse(launch.make_parser(), [*options, "run.py", *arguments])
    assert (parsed.script, parsed.arguments) == ("run.py", arguments)


@settings(max_examples=300, deadline=None)
@given(ARGUMENTS)
def test_arguments_are_on_no_command_line(arguments):
    for backend in host.BACKENDS:
        here, others = make_plan(backend, *arguments).orders("/job", PROGRAM)
        assert here["commands"] == make_plan(backend).orders("/job", PROGRAM)[0]["commands"]
        assert json.loads(json.dumps(here))["job"]["script"] == ["run.py", *arguments]


@settings(max_examples=30, deadline=None)
@given(ARGUMENTS)
def test_commands_over_ssh_survive_the_other_shell(arguments):
    *_, login, text = supervise.over_ssh("me@b", ["printf", "%s\\0", "x", *arguments])
    assert login == "me@b"
    printed = subprocess.run(["sh", "-c", os.fsencode(text)], capture_output=True, check=True).stdout
    assert printed == b"".join(os.fsencode(word) + b"\0" for word in ["x", *arguments])


def test_shown_commands_hide_secrets():
    words = ["--hub_token", "hf_abc", "--api_key=k1", "--token", "--lr", "1", "--tokens", "5", "--api-key", "k2"]
    shown = ["--hub_token", "***", "--api_key=***", "--token", "--lr", "1", "--tokens", "5", "--api-key", "***"]
    words += ["--hub_tok", "hf_def", "--push-to-hub-t=x", "--push_to_hub", "True", "token"]  # as the scripts take them
    shown += ["--hub_tok", "***", "--push-to-hub-t=***", "--push_to_hub", "True", "token"]
    assert variables.hide(words) == shown


# Environment


ENVIRON = {
    "PT_HPU_LAZY_MODE": "1",
    "HABANA_LOGS": "/l",
    "HCCL_OVER_TCP": "1",
    "HF_HOME": "/h",
    "OMP_NUM_THREADS": "3",
    "PYTHONPATH": "/p",
    "LD_LIBRARY_PATH": "/l",
    "GLOO_SOCKET_IFNAME": "eth1",
    "NCCL_SOCKET_IFNAME": "eth1",
    "GAUDI_SIMULATOR": "8",
    "HF_TOKEN": "s",
    "HF_API_KEY": "s",
    "PT_PASSWORD_FILE": "s",
    "WANDB_API_KEY": "s",
    "HOME": "/root",
    "PATH": "/bin",
    "MY_OWN": "m",
}


def test_forwarded_variables():
    got = variables.rank_environment(ENVIRON, {}, on_cpu=True)
    assert set(ENVIRON) - set(got) == {
        "HF_TOKEN",
        "HF_API_KEY",
        "PT_PASSWORD_FILE",
        "WANDB_API_KEY",
        "HOME",
        "PATH",
        "MY_OWN",
    }
    assert all(ENVIRON[name] == value for name, value in got.items())


def test_named_variables_are_forwarded_secret_or_not():
    named = variables.named_variables(["HF_TOKEN", "MY_OWN=x=y", "EMPTY="], ENVIRON)
    assert named == {"HF_TOKEN": "s", "MY_OWN": "x=y", "EMPTY": ""}
    assert variables.rank_environment(ENVIRON, named, on_cpu=True).items() >= named.items()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("NOT_SET", "not set"),
        ("HF_TOKEN=abc", "export HF_TOKEN"),
        ("=x", "not the name"),
        ("A B=1", "not the name"),
        ("", "not the name"),
        ("RANK=3", "the launcher places the ranks"),
        ("MASTER_ADDR=10.0.0.1", "the launcher places the ranks"),
    ],
)
def test_bad_env_options(option, words):
    with pytest.raises(UserError, match=words):
        variables.named_variables([option], ENVIRON)


def test_an_outer_jobs_places_are_dropped():
    outer = {"RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "TORCHELASTIC_RUN_ID", "GAUDI_SPAWN_JOB"}
    outer |= {"PET_NNODES", "CROSS_RANK", "CROSS_SIZE"}
    assert all(variables.matches(name, variables.STALE) for name in outer)
    own = {*ENVIRON, "PMIX_MCA_gds", "CROSS_VALIDATION_FOLD"}
    assert not any(variables.matches(name, variables.STALE) for name in own)


def test_simulated_cards_put_the_stand_in_last():
    got = variables.rank_environment({"GAUDI_SIMULATOR": "2", "PYTHONPATH": "/mine"}, {}, on_cpu=False)
    first, last = got["PYTHONPATH"].split(":")
    assert first == "/mine"
    assert os.path.isdir(os.path.join(last, "habana_frameworks"))
    assert "PYTHONPATH" not in variables.rank_environment({"GAUDI_SIMULATOR": "2"}, {}, on_cpu=True)


def test_settings_of_ranks():
    own = {"PT_X": "1", "HABANA_LOGS": "/a", "HCCL_SOCKET_IFNAME": "eth0", "HOME": "/", "HCCL_Y": "2"}
    assert digests(own).keys() == {"PT_X", "HCCL_Y"}
    ranks = [("a", digests(own)), ("a", digests({**own, "HABANA_LOGS": "/b"}))]
    assert disagreement(ranks) is None
    for other in ({**own, "PT_X": "2"}, {"HCCL_Y": "2"}):
        assert disagreement([*ranks, ("b", digests(other))]).startswith("PT_X: rank 2 on host b has another value")


# Cards, CPUs, ports


def test_count_cards(tmp_path, monkeypatch):
    monkeypatch.delenv("GAUDI_SIMULATOR", raising=False)
    assert host.count_cards({}, str(tmp_path)) == 0
    (tmp_path / "sys/class/accel").mkdir(parents=True)
    for index in range(4):
        (tmp_path / f"sys/class/accel/accel{index}").touch()
        (tmp_path / f"sys/class/accel/accel_controlD{index}").touch()
    assert host.count_cards({}, str(tmp_path)) == 4
    (tmp_path / "dev/accel").mkdir(parents=True)
    for index in range(8):
        (tmp_path / f"dev/accel/accel{index}").touch()
    assert host.count_cards({}, str(tmp_path)) == 8
    assert host.count_cards({"HABANA_VISIBLE_MODULES": "0,1,2"}, str(tmp_path)) == 3
    monkeypatch.setenv("GAUDI_SIMULATOR", "2")
    assert host.count_cards({}, str(tmp_path)) == 2


@pytest.mark.parametrize(
    ("cards", "ranks", "arguments", "good"),
    [
        (8, 8, ["--use_habana"], True),
        (8, 9, ["--use_habana"], False),
        (2, 4, [], False),
        (2, 4, ["--use_habana", "--use_cpu"], True),
        (0, 4, ["--lr", "1"], True),
        (0, 1, ["--use_habana"], False),
        (0, 64, ["--use_cpu"], True),
        (2, 4, ["--use_habana", "--use_cpu=True"], True),
        (2, 4, ["--use_habana", "--use_cpu", "true"], True),
        (2, 4, ["--use_habana", "--use_cpu=False"], False),
        (2, 4, ["cpu.yaml", "--use_habana"], True),
        (2, 4, ["cpu.json"], True),
        (2, 4, ["card.json"], False),
        (0, 2, ["card.json"], False),
        (0, 2, ["no_such.json", "--use_habana=perhaps"], True),
    ],
)
def test_cards_and_ranks(cards, ranks, arguments, good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu.yaml").write_text("use_cpu: true\n")
    (tmp_path / "cpu.json").write_text('{"use_cpu": true, "use_habana": true}')
    (tmp_path / "card.json").write_text('{"use_habana": true}')
    on_cpu, on_card = device.wanted_card(arguments)
    if good:
        host.check_cards(cards, ranks, on_cpu, on_card)
    else:
        with pytest.raises(UserError, match=f"{ranks} ranks on this host but {cards} cards"):
            host.check_cards(cards, ranks, on_cpu, on_card)


@pytest.mark.parametrize(
    ("cpus", "ranks", "quota", "threads"),
    [(160, 8, "max", 20), (160, 8, "3200000", 4), (2, 4, "max", 1), (8, 2, "50000", 1), (3, 2, "max", 1)],
)
def test_threads_per_rank(cpus, ranks, quota, threads, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    assert host.threads_per_rank(ranks, str(tmp_path / "cpu.max")) == threads


def test_a_busy_port_is_refused_and_a_claimed_one_not_taken_twice():
    with reserved_port() as busy:
        with socket.create_server(("127.0.0.1", busy)), pytest.raises(UserError, match=f"--master_port {busy}"):
            host.claim_port(busy)
        claim = host.claim_port(busy)
        assert claim.getsockname()[1] == busy
        with pytest.raises(UserError, match=f"--master_port {busy}"):
            host.claim_port(busy)
        with socket.create_server(("", busy)):  # rank 0
            pass
        claim.close()


CLAIMS = """
from gaudi_lm.host import claim_port
taken = set()
for _ in range(400):
    with claim_port(None) as claim:
        taken.add(claim.getsockname()[1])
print(len(taken))
"""


def test_a_free_port_is_not_one_that_another_job_will_use():
    """Its launcher has let go of it, and its rank 0 does not listen yet. In a process, as a claim ends with it."""
    done = subprocess.run([sys.executable, "-c", CLAIMS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "400\n", done.stderr


def test_which_hosts_are_this_one():
    assert host.own_address("localhost")
    assert host.own_address(socket.gethostname())
    assert host.own_address("127.0.0.1")
    assert not host.own_address("192.0.2.7")
    assert not host.own_address("no-such-host.invalid")


# Reports


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_rank_reports_on_a_full_disk_in_the_place_of_the_report_before(number, tmp_path, monkeypatch):
    """A rank died of that: its run was killed without a checkpoint on a signal, or was no success at its end."""
    processes.report(str(tmp_path), "rank 0")
    before = (tmp_path / "rank 0.report").stat()

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(processes.Path, "write_text", fail)
    processes.report(str(tmp_path), "rank 0", status=3, what="rank 0 failed", stopped=False)
    after, found = (tmp_path / "rank 0.report").stat(), processes.reports(str(tmp_path))["rank 0"]
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size) and found["pid"] == os.getpid()
    assert found["status"] == 3
    monkeypatch.undo()
    processes.report(str(tmp_path / "gone"), "rank 0")  # the job is over


# The supervisor, look by look: reports take the place of ranks


def order_for(folder: Path, command: list[str], *script: str | None) -> dict:
    """An order for rank 3 of 4, alone on host b."""
    places = {"host": "b", "slots": 1, "first_rank": 3, "world_size": 4}
    order = {"folder": str(folder), "cwd": str(ROOT), "grace": 30.0, "wait": 0.0, "backend": "mpirun", "login": "me@b"}
    job = {"script": script, "logs": "", "environ": {}, **places}
    return {**order, "commands": [command], "environ": {"RANK": "3"}, "job": job}


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """``watch(**order)``: a supervisor of ranks 0 to 2, what has been sent to them, and a clock to be set."""
    sent, clock = [], SimpleNamespace(now=100.0)
    monkeypatch.setattr(processes, "on_signals", lambda serve: None)
    monkeypatch.setattr(processes, "reap", dict)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    for module in (processes, supervise):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    for name in ("rank 0", "rank 1", "rank 2"):
        processes.report(str(tmp_path), name)

    def make(**order):
        return supervise.Host({**order_for(tmp_path, []), **order}), sent, clock

    return make


def test_a_signal_reaches_each_rank_once_and_others_set_no_later_end(watch):
    """A rank takes a second one for impatience, and a scheduler may repeat its own."""
    job, sent, clock = watch()
    for seconds, signals, wanted in ((0, [15], [15] * 3), (1, [], []), (20, [15], []), (8.9, [10], [10] * 3)):
        clock.now, job.signals = clock.now + seconds, list(signals)
        sent.clear()
        assert job._goes_on({7: None}) and sent == wanted
    clock.now = 130.0
    assert not job._goes_on({7: None}) and job.killed
    assert job._conclude(0, whole=False) == 143


def test_the_first_failure_is_the_earliest_of_all_that_have_come(watch, tmp_path):
    job, sent, clock = watch(wait=0.5)
    processes.report(str(tmp_path), "rank 1", status=9, what="rank 1 failed", stopped=False)
    clock.now += 0.3
    assert job._goes_on({7: None}) and not job.failure, "another host may tell of an earlier one"
    before = {"time": clock.now - 0.4, "stopped": False}
    processes.report(str(tmp_path), "rank 0", status=7, what="rank 0 failed", **before)
    clock.now += 0.2
    assert job._goes_on({7: None}) and sent == [signal.SIGTERM], "the third rank may save"
    clock.now += supervise.FAILURE_GRACE
    assert not job._goes_on({7: None})
    assert job.failure["what"] == "rank 0 failed" and job._conclude(1, whole=True) == 7


@pytest.mark.parametrize("silence", [supervise.SILENCE + 1, 0])
def test_another_host_goes_on_while_it_hears_of_the_launcher(silence, watch, monkeypatch):
    """Not longer: none of its signs for a while, or the end of the connection."""
    job, _, clock = watch()
    job.remote, said = True, [b"\n", None, b"\n", None, *([None] if silence else [b""])]

    def read(*_):
        if (data := said.pop(0)) is None:
            raise BlockingIOError
        return data

    monkeypatch.setattr(os, "read", read)
    for seconds in (0, supervise.SILENCE - 1, 1, supervise.SILENCE - 1):
        clock.now += seconds
        assert job._goes_on({7: None})
    clock.now += silence
    assert not job._goes_on({7: None})


def test_a_connection_gives_signs_of_the_launcher(tmp_path):
    (tmp_path / "hosts").write_text(json.dumps({"b": order_for(tmp_path, [])}))
    (tmp_path / "ssh").write_text("#!/bin/sh\nfor _ in order and three signs; do read -r line; done\n")
    (tmp_path / "ssh").chmod(0o755)
    code = "import sys; from gaudi_lm.launcher import supervise; supervise.HEARTBEAT = 0.01; "
    code += "sys.exit(supervise.connect(sys.argv[1], 'b'))"
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environ, check=True, timeout=60)


def test_ranks_that_outlive_their_backend_are_not_waited_for_without_end(watch):
    job, sent, clock = watch()
    assert job._goes_on({7: 0}) and sent == []
    clock.now += supervise.SILENCE
    assert not job._goes_on({7: 0}) and job._conclude(0, whole=False) == 1


def test_a_backend_that_ends_well_without_its_ranks_is_no_success(tmp_path):
    """As an mpirun may that is stopped; in a process of its own, as a supervisor ends all that is below it."""
    (tmp_path / "job").mkdir()
    code = "import json, sys; from gaudi_lm.launcher import supervise as own; "
    code += "sys.exit(own.Host(json.loads(sys.argv[1])).run())"
    command = [sys.executable, "-c", code, json.dumps(order_for(tmp_path / "job", ["true"]))]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and not (tmp_path / "job").exists()
    assert done.stderr.endswith("error: mpirun ended before the ranks had, with exit status 0\n")


@pytest.mark.parametrize(
    ("script", "status", "said", "reports"),
    [
        ("import sys; sys.stderr.write('no end of line')", 0, "no end of line", {}),
        ("raise SystemExit(7)", 7, "", {"host b itself": (7, "rank 3 on host b failed with exit status 7")}),
        (None, 255, "no route", {"host b": (1, "host b is lost: ssh has ended with exit status 255")}),
    ],
)
def test_another_host_is_served_and_left_as_it_was(script, status, said, reports, tmp_path):
    """By a shell in place of ssh and sshd; None is a host that is not reached."""
    here, there = tmp_path / "here", tmp_path / "its files"
    for folder in (here, there):
        folder.mkdir()
    ssh = 'for last; do :; done\nexec sh -c "$last"\n' if script else "printf 'no route' >&2\nexit 255\n"
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{ssh}")
    (tmp_path / "ssh").chmod(0o755)
    order = order_for(here, processes.python("rank.main"), "-c", script)
    (here / "hosts").write_text(json.dumps({"b": order}))
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(there)}
    command = processes.python("supervise.connect", str(here), "me@b")
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, said)
    found = {name: one for name, one in processes.reports(str(here)).items() if one["status"]}
    assert {name: (one["status"], one["what"]) for name, one in found.items()} == reports
    assert not any(one["stopped"] for one in found.values())
    assert list(there.iterdir()) == [] and {path.suffix for path in here.iterdir()} == {"", ".report"}

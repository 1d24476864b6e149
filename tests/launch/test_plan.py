"""The launcher's pure functions: hostfiles, commands, environments, placement. No engine is started."""

import json
import os
import shlex
import socket
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaudi_lm import hostfile, launch, placement
from gaudi_lm.hostfile import Host
from gaudi_lm.processes import frame, take_frames
from gaudi_lm.rank import script_command
from gaudi_lm.runtime import UserError
from launch.spawning import HOSTILE

# What an argument can hold: any bytes but NUL, as Python shows them.
ARGUMENT = st.one_of(
    st.binary(max_size=20).map(lambda data: os.fsdecode(data.replace(b"\0", b""))),
    st.text(alphabet=":-=$'\"\\ \n;`*", max_size=6),
    st.sampled_from(HOSTILE),
)
ARGUMENTS = st.lists(ARGUMENT, max_size=8)


def make_plan(engine: str, *arguments: str, hosts: tuple[Host, ...] = (Host("here", 2),), **more) -> launch.Plan:
    more.setdefault("local", tuple(index == 0 for index in range(len(hosts))))
    version = {"engine_version": (5, 0), "engine_program": "/opt/bin/mpirun"} if engine == "mpi" else {}
    return launch.Plan(engine, hosts, ("run.py", *arguments), "10.0.0.1", 29511, folder="/job", **{**version, **more})


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
    plan = make_plan("mpi", hosts=(Host("a", 2), Host("b", 3)))
    assert plan.places == [(0, 0, 5, 2), (1, 1, 5, 2), (2, 0, 5, 3), (3, 1, 5, 3), (4, 2, 5, 3)]
    assert [plan.host_of[rank].name for rank in range(5)] == ["a", "a", "b", "b", "b"]
    assert list(plan.ranks_of(plan.hosts[1])) == [2, 3, 4]


# Commands


def test_torch_command():
    [(host, command)] = launch.engine_commands(make_plan("torch", "--x", "1"))
    assert host is None
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert {"--nproc_per_node=2", "--master_addr=10.0.0.1", "--master_port=29511"} <= set(command)
    assert command[-4:] == [launch.RANK_PROGRAM, "run.py", "--x", "1"]


@pytest.mark.parametrize(
    ("version", "words"),
    [((4, 1), ["--map-by", "slot", "--oversubscribe"]), ((5, 0), ["--map-by", "slot:oversubscribe"])],
)
def test_mpi_command_on_one_host(version, words):
    [(host, command)] = launch.engine_commands(make_plan("mpi", engine_version=version))
    assert host is None
    assert command[:6] == ["env", "MASTER_ADDR=10.0.0.1", "MASTER_PORT=29511", "/opt/bin/mpirun", "-n", "2"]
    assert shlex.join(words) in shlex.join(command)
    assert "--host" not in command
    assert ("--allow-run-as-root" in command) == (os.geteuid() == 0)


def test_mpi_command_on_several_hosts_forwards_by_name():
    plan = make_plan("mpi", hosts=(Host("a", 2), Host("b", 3, "me")))
    [(host, command)] = launch.engine_commands(plan, {"PT_X": "value", "MY_TOKEN": "secret"})
    assert host is None
    assert command[command.index("--host") + 1] == "a:2,me@b:3"
    named = {command[i + 1] for i, word in enumerate(command) if word == "-x"}
    assert named == {"PT_X", "MY_TOKEN", "MASTER_ADDR", "MASTER_PORT", "GAUDI_SPAWN_JOB"}
    assert not {"value", "secret"} & set(" ".join(command).split())


def test_deepspeed_runs_once_on_each_host():
    plan = make_plan("deepspeed", hosts=(Host("a", 1), Host("b", 2, "me")))
    commands = launch.engine_commands(plan)
    assert [host.login if host else None for host, _ in commands] == [None, "me@b"]
    assert [[word for word in command if word.startswith("--node_rank")] for _, command in commands] == [
        ["--node_rank=0"],
        ["--node_rank=1"],
    ]


def arguments_of(words: list[str]) -> list[str]:
    """The script's arguments, as the rank program hands them on."""
    rank_program = words.index(launch.RANK_PROGRAM)
    return script_command(words[rank_program + 1 :])[3:]


@settings(max_examples=300, deadline=None)
@given(ARGUMENTS)
def test_arguments_through_torchs_parser(arguments):
    from torch.distributed.run import get_args_parser

    [(_, command)] = launch.engine_commands(make_plan("torch", *arguments))
    options = get_args_parser().parse_args(command[3:])
    assert options.training_script == sys.executable
    assert arguments_of(options.training_script_args) == arguments


@settings(max_examples=300, deadline=None)
@given(ARGUMENTS)
def test_arguments_through_deepspeeds_parser(arguments):
    from unittest import mock

    from deepspeed.launcher.launch import parse_args

    [(_, command)] = launch.engine_commands(make_plan("deepspeed", *arguments))
    with mock.patch.object(sys, "argv", command[2:]):
        options = parse_args()
    assert options.training_script == sys.executable
    assert arguments_of(options.training_script_args) == arguments


@given(ARGUMENTS)
def test_arguments_to_mpirun_hold_no_lone_colon(arguments):
    [(_, command)] = launch.engine_commands(make_plan("mpi", *arguments))
    assert ":" not in command
    assert arguments_of(command) == arguments


@settings(max_examples=30, deadline=None)
@given(ARGUMENTS)
def test_shown_command_can_be_pasted(arguments):
    text = launch.shown(["printf", "%s\\0", "x", *arguments])
    printed = subprocess.run(["sh", "-c", os.fsencode(text)], capture_output=True, check=True).stdout
    assert printed == b"".join(os.fsencode(word) + b"\0" for word in ["x", *arguments])


@settings(max_examples=30, deadline=None)
@given(ARGUMENTS)
def test_commands_over_ssh_survive_the_other_shell(arguments):
    *_, login, text = launch.over_ssh(Host("b", 1, "me"), ["printf", "%s\\0", "x", *arguments])
    assert login == "me@b"
    printed = subprocess.run(["sh", "-c", os.fsencode(text)], capture_output=True, check=True).stdout
    assert printed == b"".join(os.fsencode(word) + b"\0" for word in ["x", *arguments])


def test_shown_command_hides_secrets():
    shown = launch.shown(["run.py", "--hub_token", "hf_abc", "--api_key=k1", "--token", "--lr", "1", "--tokens", "5"])
    assert shown == "run.py --hub_token '***' '--api_key=***' --token --lr 1 --tokens 5"
    assert launch.secret_values(["--hub_token", "hf_abcdef", "--use_auth_token", "True", "True"]) == {"hf_abcdef"}


def test_remote_start_keeps_arguments_and_environment(tmp_path):
    probe = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['MY_X'], os.getcwd()]))"
    order = {"command": [sys.executable, "-c", probe, *HOSTILE], "env": {"MY_X": "a\nb"}, "folder": str(tmp_path)}
    done = subprocess.run(launch.REMOTE_START, input=json.dumps(order).encode(), capture_output=True, check=True)
    assert json.loads(done.stdout) == [HOSTILE, "a\nb", str(tmp_path)]


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
    got = launch.forwarded_variables(ENVIRON, {})
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
    named = launch.named_variables(["HF_TOKEN", "MY_OWN=x=y", "EMPTY="], ENVIRON)
    assert named == {"HF_TOKEN": "s", "MY_OWN": "x=y", "EMPTY": ""}
    assert launch.forwarded_variables(ENVIRON, named).items() >= named.items()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("NOT_SET", "not set"),
        ("HF_TOKEN=abc", "export HF_TOKEN"),
        ("=x", "not the name"),
        ("A B=1", "not the name"),
        ("", "not the name"),
    ],
)
def test_bad_env_options(option, words):
    with pytest.raises(UserError, match=words):
        launch.named_variables([option], ENVIRON)


def test_engine_environment_drops_an_outer_jobs_places():
    outer = {
        "RANK": "3",
        "WORLD_SIZE": "9",
        "OMPI_COMM_WORLD_RANK": "3",
        "PMIX_RANK": "3",
        "TORCHELASTIC_RUN_ID": "x",
        "HOME": "/h",
    }
    got = launch.engine_environment(make_plan("torch"), outer, {"MY_X": "1"})
    assert not got.keys() & (outer.keys() - {"HOME"})
    assert (got["MASTER_ADDR"], got["MASTER_PORT"], got["MY_X"]) == ("10.0.0.1", "29511", "1")


def test_simulated_cards_put_the_stand_in_last():
    plan = make_plan("torch")
    got = launch.rank_environment(plan, {"GAUDI_SIMULATOR": "2", "PYTHONPATH": "/mine"}, [])
    first, last = got["PYTHONPATH"].split(":")
    assert first == "/mine"
    assert os.path.isdir(os.path.join(last, "habana_frameworks"))
    assert launch.rank_environment(plan, {"GAUDI_SIMULATOR": "2"}, ["--use_cpu"]).get("PYTHONPATH") is None


# Cards, CPUs, ports


def test_count_cards(tmp_path, monkeypatch):
    monkeypatch.delenv("GAUDI_SIMULATOR", raising=False)
    assert placement.count_cards({}, str(tmp_path)) == 0
    (tmp_path / "sys/class/accel").mkdir(parents=True)
    for index in range(4):
        (tmp_path / f"sys/class/accel/accel{index}").touch()
        (tmp_path / f"sys/class/accel/accel_controlD{index}").touch()
    assert placement.count_cards({}, str(tmp_path)) == 4
    (tmp_path / "dev/accel").mkdir(parents=True)
    for index in range(8):
        (tmp_path / f"dev/accel/accel{index}").touch()
    assert placement.count_cards({}, str(tmp_path)) == 8
    assert placement.count_cards({"HABANA_VISIBLE_MODULES": "0,1,2"}, str(tmp_path)) == 3
    monkeypatch.setenv("GAUDI_SIMULATOR", "2")
    assert placement.count_cards({}, str(tmp_path)) == 2


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
    ],
)
def test_cards_and_ranks(cards, ranks, arguments, good):
    if good:
        placement.check_cards(cards, ranks, arguments)
    else:
        with pytest.raises(UserError, match=f"{ranks} ranks on this host but {cards} cards"):
            placement.check_cards(cards, ranks, arguments)


@given(st.integers(1, 300), st.integers(1, 40))
def test_cpus_are_shared_out(count, ranks):
    cpus = list(range(count))
    parts = [placement.share(cpus, ranks, rank) for rank in range(ranks)]
    if ranks > count:
        assert all(part == cpus for part in parts)
    else:
        assert [cpu for part in parts for cpu in part] == cpus
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_cpus_by_socket_keep_whole_cores_together(tmp_path):
    # Two sockets of two cores of two threads, numbered as Xeons number them: siblings are 4 apart.
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{cpu % 2}\n")
        (folder / "core_id").write_text(f"{cpu % 4 // 2}\n")
    assert placement.ordered_cpus(set(range(8)), "socket", str(tmp_path)) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert placement.ordered_cpus({5, 1, 3}, "slot", str(tmp_path)) == [1, 3, 5]


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        ({}, "0::/\n", None),
        ({"cpu.max": "max 100000"}, "0::/\n", None),
        ({"cpu.max": "150000 100000"}, "0::/\n", 1.5),
        ({"cpu.max": "max 100000", "a/cpu.max": "400000 100000", "a/b/cpu.max": "800000 100000"}, "0::/a/b\n", 4.0),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/\n", 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu,cpuacct:/\n", None),
    ],
)
def test_cpu_quota_of_cgroups(tmp_path, files, membership, quota):
    for name, text in files.items():
        (tmp_path / "cg" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cg" / name).write_text(text + "\n")
    (tmp_path / "membership").write_text(membership)
    assert placement.cpu_quota(str(tmp_path / "cg"), str(tmp_path / "membership")) == quota


@pytest.mark.parametrize(
    ("cpus", "ranks", "quota", "threads"),
    [(160, 8, None, 20), (160, 8, 32.0, 4), (2, 4, None, 1), (8, 2, 0.5, 1), (3, 2, None, 1)],
)
def test_threads_per_rank(cpus, ranks, quota, threads):
    assert placement.threads_per_rank(cpus, ranks, quota) == threads


def test_a_busy_port_is_refused_and_a_claimed_one_not_taken_twice():
    with socket.create_server(("127.0.0.1", 0)) as server:
        busy = server.getsockname()[1]
        with pytest.raises(UserError, match=f"--master_port {busy}"):
            placement.choose_port(busy, "127.0.0.1", here=True)
    port, claim = placement.choose_port(busy, "127.0.0.1", here=True)
    claim.close()
    assert port == busy
    chosen = [placement.choose_port(None, "127.0.0.1", here=True) for _ in range(200)]
    assert len({port for port, _ in chosen}) == 200
    for _, claim in chosen:
        claim.close()


def test_which_hosts_are_this_one():
    assert placement.is_local("localhost")
    assert placement.is_local(socket.gethostname())
    assert placement.is_local("127.0.0.1")
    assert not placement.is_local("192.0.2.7")
    assert not placement.is_local("no-such-host.invalid")


@given(st.lists(st.tuples(st.sampled_from([b"1", b"X"]), st.binary(max_size=40))), st.integers(1, 30))
def test_frames_in_any_pieces(frames, size):
    stream = b"".join(frame(kind, payload) for kind, payload in frames)
    buffer, got = bytearray(), []
    for start in range(0, len(stream), size):
        buffer += stream[start : start + size]
        got += take_frames(buffer)
    assert got == frames
    assert not buffer

"""The launcher: its options, the plan that they make, and the process that stands for the job."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from gaudi_lm.device import check_cards, count_cards, wanted_card
from gaudi_lm.errors import UserError, user_errors
from gaudi_lm.launcher import plan, processes, supervise
from gaudi_lm.launcher.hostfile import Host, read_hostfile
from gaudi_lm.launcher.rank import JOB_VARIABLE

# Left over from a job around this one, these would give the ranks wrong places.
STALE = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT CROSS_* "
    f"TORCHELASTIC_* OMPI_COMM_WORLD_* PMIX_* PMI_* {JOB_VARIABLE}"
).split()


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the options)")


def between(least: float, most: float, what: str, kind: type = int) -> Callable[[str], float]:
    """A type of numbers for argparse."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            if text.isascii() and least <= kind(text) <= most:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return convert


def make_parser(description: str | None = None) -> Parser:
    usage = "gaudi_spawn.py [options] SCRIPT [the script's own flags]"
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("gaudi_spawn.py", usage, description, formatter_class=raw, allow_abbrev=False)

    def add(name: str, help: str, **how: object) -> None:
        parser.add_argument(name, help=help, **how)

    ranks, port = between(1, 10**6, "a number of ranks, at least 1"), between(1, 65535, "a port, 1 to 65535")
    seconds = between(0, 10**9, "a number of seconds", float)
    add("--world_size", "number of ranks, one card each (default: 1, or the hostfile's)", type=ranks, metavar="N")
    add("--use_mpi", "start the ranks with Open MPI's mpirun, version 4 or 5", action="store_true")
    add("--use_deepspeed", "start the ranks with DeepSpeed's launcher", action="store_true")
    add("--hostfile", "several hosts: lines of '[user@]host slots=N', as DeepSpeed reads them", metavar="FILE")
    add("--master_port", "port of rank 0 where the ranks meet (default: a free one)", type=port, metavar="PORT")
    text = (
        "an environment variable for all ranks, on all hosts; again for more. Those of Gaudi (PT_*, HABANA_*, HCCL_*, "
    )
    text += "HF_*, OMP_*) and paths go along by themselves, tokens, keys and passwords only when named here"
    add("--env", text, action="append", default=[], metavar="NAME[=VALUE]")
    add("--log_dir", "where the backend keeps the output of each rank, in files of its own naming", metavar="DIR")
    add("--grace", "seconds between a signal and SIGKILL (default: 30)", type=seconds, default=30.0, metavar="S")
    text = "let the backend bind each rank to a socket or to a core (default: none)"
    add("--map_by", text, choices=("socket", "slot", "none"), default="none")
    add("--dry_run", "print hosts, ranks, cards, command and environment; start nothing", action="store_true")
    add("script", "the script that every rank runs, with its own flags", nargs="?", metavar="SCRIPT")
    return parser


def parse(parser: Parser, words: list[str]) -> argparse.Namespace:
    """The options, and the script's ``arguments`` as they are: argparse would drop a ``--`` among them."""
    takes = {name for action in parser._actions if action.nargs is None for name in action.option_strings}
    end = 0
    while end < len(words) and words[end].startswith("-"):
        end += 1 + (words[end] in takes)
    options = parser.parse_args(words[: end + 1])
    options.arguments = words[end + 1 :]
    return options


def make_plan(options: argparse.Namespace, environ: dict[str, str], cards: int) -> tuple[plan.Plan, socket.socket]:
    """Check the options against one another, the hostfile and this host; the plan, and a claim to its port.

    Raises:
        UserError: naming the option and the way out.
    """
    if options.use_mpi and options.use_deepspeed:
        raise UserError("--use_mpi and --use_deepspeed: choose one of them")
    backend = "mpi" if options.use_mpi else "deepspeed" if options.use_deepspeed else "torch"
    if options.script is None:
        raise UserError("no script: gaudi_spawn.py [options] SCRIPT [the script's own flags]")
    if not Path(options.script).is_file():
        raise UserError(f"{options.script}: no such script")
    hosts, path = (Host(socket.gethostname(), options.world_size or 1),), options.hostfile
    if path is not None:
        if backend == "torch":
            raise UserError("--hostfile needs --use_deepspeed or --use_mpi: torch.distributed serves one host")
        hosts = read_hostfile(path)
        slots = sum(host.slots for host in hosts)
        if options.world_size not in (None, slots):
            raise UserError(f"--world_size {options.world_size}, but {path} has {slots} slots on {len(hosts)} hosts")
    local = tuple(plan.own_address(host.name) is not None for host in hosts) if path else (True,)
    here = [host for host, is_here in zip(hosts, local, strict=True) if is_here]
    if len(here) > 1:
        names = " and ".join(host.name for host in here)
        raise UserError(f"--hostfile {path}: {names} are all this host; give it one line")
    if options.map_by != "none" and backend == "torch":
        raise UserError(f"--map_by {options.map_by}: torch.distributed binds ranks for CUDA only; give --use_mpi")
    if options.map_by != "none" and backend == "deepspeed" and shutil.which("numactl") is None:
        raise UserError(f"--map_by {options.map_by} with --use_deepspeed needs numactl; install it, or give --use_mpi")
    on_cpu, on_card = wanted_card(options.arguments)
    check_cards(cards, sum(host.slots for host in here), on_cpu, on_card)
    mpirun, version = plan.find_backend(backend)
    address = "127.0.0.1" if all(local) else hosts[0].name
    if local[0] and not all(local):
        address = plan.own_address(hosts[local.index(False)].name, towards=True)
    rank_environ = plan.rank_environment(environ, plan.named_variables(options.env, environ), on_cpu)
    log_dir = os.path.abspath(options.log_dir) if options.log_dir else ""
    if log_dir and not options.dry_run:
        try:
            os.makedirs(log_dir, exist_ok=True)
        except OSError as error:
            raise UserError(f"--log_dir {options.log_dir}: {error.strerror.lower()}") from error
    claim, script = plan.claim_port(options.master_port), (options.script, *options.arguments)
    what = {"mpirun": mpirun, "version": version, "environ": rank_environ}
    what |= {"map_by": options.map_by, "log_dir": log_dir, "grace": options.grace}
    return plan.Plan(backend, hosts, script, address, claim.getsockname()[1], local, **what), claim


def run(job: plan.Plan) -> int:
    """Run a job to its end; the exit status. Whatever ends this process, even SIGKILL, ends the job."""
    if problem := job.check_hosts():
        supervise.say(f"error: {problem}")
        return 1
    folder = tempfile.mkdtemp(prefix="gaudi_spawn-")
    order, others = job.orders(folder, processes.python("rank.main"))
    Path(folder, "hosts").write_text(json.dumps(others))
    Path(folder, "ssh").write_text(f'exec {shlex.join(processes.python("supervise.connect", folder))} "$@"\n')
    Path(folder, "hostfile").write_text("".join(f"{host.login} slots={host.slots}\n" for host in job.hosts))
    for command in order["commands"]:
        supervise.say(f"command: {shlex.join(command)}")
    for name in [name for name in os.environ if plan.matches(name, STALE)]:
        del os.environ[name]
    processes.adopt_orphans()
    signal.pthread_sigmask(signal.SIG_BLOCK, processes.STOP_SIGNALS)
    supervisor = os.fork()
    if supervisor == 0:
        status = 1
        try:
            os.setsid()  # a terminal's Ctrl-C goes to the launcher alone
            processes.die_with_parent(processes.PARENT_ENDED)
            host = supervise.Host(order)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, processes.STOP_SIGNALS)
            status = host.run()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    processes.on_signals(lambda number: os.kill(supervisor, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, processes.STOP_SIGNALS)
    code = os.waitstatus_to_exitcode(os.waitpid(supervisor, 0)[1])
    processes.kill_descendants()
    shutil.rmtree(folder, ignore_errors=True)
    if code < 0:
        supervise.say(f"error: the supervisor of the job was killed, {processes.named(128 - code)}")
    return code if code >= 0 else 128 - code


def main(description: str | None = None) -> int:
    """The launcher; its exit status."""
    with user_errors():
        options = parse(make_parser(description), sys.argv[1:])
        cards = count_cards(dict(os.environ))
        job, claim = make_plan(options, dict(os.environ), cards)
    with claim:
        if not options.dry_run:
            return run(job)
    sys.stdout.buffer.write(job.describe(cards).encode(errors="surrogateescape") + b"\n")
    return 0

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
import time
from functools import partial
from pathlib import Path

from gaudi_lm import host
from gaudi_lm.config_files import split_flag
from gaudi_lm.device import wanted_card
from gaudi_lm.errors import UserError, user_errors
from gaudi_lm.launcher import plan, processes, supervise
from gaudi_lm.launcher.hostfile import Host, read_hostfile
from gaudi_lm.variables import STALE, matches, named_variables, rank_environment

USAGE = "gaudi_spawn.py [options] SCRIPT [the script's own flags]"


def number(kind: type, least: float, most: float, what: str, text: str) -> float:
    """A type of numbers for argparse."""
    with contextlib.suppress(ValueError):
        if text.isascii() and least <= kind(text) <= most:
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}")


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    how: dict = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("gaudi_spawn.py", USAGE, description, **how)
    ranks = partial(number, int, 1, 10**6, "a number of ranks, at least 1")
    port = partial(number, int, 1, 65535, "a port, 1 to 65535")
    seconds = partial(number, float, 0, 10**9, "a number of seconds")

    def error(message: str) -> None:
        raise UserError(f"{message} (--help lists the options)")

    add, parser.error = parser.add_argument, error  # type: ignore
    add("--world_size", help="number of ranks, one card each (default: 1, or the hostfile's)", type=ranks, metavar="N")
    add("--use_mpi", help="start the ranks with Open MPI's mpirun, version 4 or 5", action="store_true")
    add("--use_deepspeed", help="start the ranks with DeepSpeed's launcher", action="store_true")
    add("--hostfile", help="several hosts: lines of '[user@]host slots=N', as DeepSpeed reads them", metavar="FILE")
    add("--master_port", help="port of rank 0 where the ranks meet (default: a free one)", type=port, metavar="PORT")
    text = "a variable for all ranks; PT_*, HABANA_*, HCCL_*, HF_*, OMP_* and paths go along anyway, secrets do not"
    add("--env", help=text, action="append", default=[], metavar="NAME[=VALUE]")
    add("--log_dir", help="where the backend keeps the output of each rank, in files of its own naming", metavar="DIR")
    add("--grace", help="seconds between a signal and SIGKILL (default: 30)", type=seconds, default=30.0, metavar="S")
    add("--map_by", help="bind ranks (default: none)", default="none", choices=("socket", "slot", "none"))
    add("--dry_run", help="print hosts, ranks, cards, command and environment; start nothing", action="store_true")
    add("script", help="the script that every rank runs, with its own flags", nargs="?", metavar="SCRIPT")
    return parser


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """The options, with _ or - within, and the script's ``arguments`` as they are: argparse would drop ``--``."""
    takes = {name for action in parser._actions if action.nargs is None for name in action.option_strings}
    words, end = list(words), 0
    while end < len(words) and words[end].startswith("-"):
        words[end] = "".join(split_flag(words[end]))
        end += 1 + (words[end] in takes)
    return parser.parse_args(words[: end + 1], argparse.Namespace(arguments=words[end + 1 :]))


def make_plan(options: argparse.Namespace, environ: dict[str, str], cards: int) -> tuple[plan.Plan, socket.socket]:
    """Options that fit one another, the hostfile and this host, or a UserError; the plan, and a claim to its port."""
    if options.use_mpi and options.use_deepspeed:
        raise UserError("--use_mpi and --use_deepspeed: choose one of them")
    backend = "mpi" if options.use_mpi else "deepspeed" if options.use_deepspeed else "torch"
    if options.script is None:
        raise UserError(f"no script: {USAGE}")
    if not Path(options.script).is_file():
        raise UserError(f"{options.script}: no such script")
    path, hosts = options.hostfile, (*[Host(socket.gethostname(), options.world_size or 1)],)
    if path is not None:
        if backend == "torch":
            raise UserError("--hostfile needs --use_deepspeed or --use_mpi: torch.distributed serves one host")
        hosts = read_hostfile(path)
        slots = sum(one.slots for one in hosts)
        if options.world_size not in (None, slots):
            raise UserError(f"--world_size {options.world_size}, but {path} has {slots} slots on {len(hosts)} hosts")
    local = tuple(host.own_address(one.name) is not None for one in hosts) if path else (True,)
    here = [one for one, is_here in zip(hosts, local, strict=True) if is_here]
    if len(here) > 1:
        raise UserError(f"--hostfile {path}: {' and '.join(one.name for one in here)} are this host: give it one line")
    on_cpu, on_card = wanted_card(options.arguments)
    host.check_cards(cards, sum(one.slots for one in here), on_cpu, on_card)
    by_ssh = not all(local) and not options.dry_run
    mpirun, version = host.find_backend(backend, options.map_by, f"--hostfile {path}" if by_ssh else "")
    address = "127.0.0.1" if all(local) else hosts[0].name
    if local[0] and not all(local):
        address = host.own_address(hosts[local.index(False)].name, towards=True) or address
    environ = rank_environment(environ, named_variables(options.env, environ), on_cpu)
    log_dir = os.path.abspath(options.log_dir) if options.log_dir else ""
    if log_dir and not options.dry_run:
        host.make_folder("--log_dir", log_dir, ",:" * (backend == "mpi"))
    claim = host.claim_port(options.master_port)
    where = (hosts, (options.script, *options.arguments), address, claim.getsockname()[1], local)
    return plan.Plan(backend, *where, mpirun, version, environ, options.map_by, log_dir, options.grace), claim


def run(job: plan.Plan) -> int:
    """Run a job to its end; the exit status. Whatever ends this process, even SIGKILL, ends the job."""
    if problem := job.check_hosts():
        supervise.say(f"error: {problem}")
        return 1
    signal.pthread_sigmask(signal.SIG_BLOCK, processes.STOP_SIGNALS)  # until somebody removes the folder after one
    folder = ""
    try:
        folder = tempfile.mkdtemp(prefix="gaudi_spawn-")
        order, others = job.orders(folder, processes.python("rank.main"))
        Path(folder, "hosts").write_text(json.dumps(others))
        Path(folder, "ssh").write_text(f'exec {shlex.join(processes.python("supervise.connect", folder))} "$0" "$@"\n')
        names = ["localhost" if own else one.login for one, own in zip(job.hosts, job.local, strict=True)]  # no alias
        Path(folder, "hostfile").write_text("".join(map("{} slots={.slots}\n".format, names, job.hosts)))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"TMPDIR: {str(error.strerror).lower()}; a job needs a folder there") from error
    for name in [name for name in os.environ if matches(name, STALE)]:
        os.environ.pop(name)
    processes.adopt_orphans()
    launcher, supervisor = os.getpid(), os.fork()
    if supervisor == 0:
        try:
            os.setsid()  # a terminal's Ctrl-C goes to the launcher alone
            own = supervise.Host(order)
            processes.die_with_parent(processes.PARENT_ENDED)
            own.signals += [processes.PARENT_ENDED] * (os.getppid() != launcher)  # killed before it was watched
            signal.pthread_sigmask(signal.SIG_UNBLOCK, processes.STOP_SIGNALS)
            os._exit(own.run())
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    processes.on_signals(lambda number: (host.hold_output(), os.kill(supervisor, number)))  # type: ignore
    signal.pthread_sigmask(signal.SIG_UNBLOCK, processes.STOP_SIGNALS)
    while not (ended := os.waitid(os.P_PID, supervisor, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
        time.sleep(supervise.PAUSE)  # a signal right before a call without end would be served after it
    status = ended.si_status + 128 * (ended.si_code != os.CLD_EXITED)  # a zombie: it takes further signals
    processes.kill_descendants()
    shutil.rmtree(folder, ignore_errors=True)
    if status != ended.si_status:
        supervise.say(f"error: the supervisor of the job was killed, {processes.named(status)}")
    return status


def main(description: str | None = None) -> int:
    """The launcher; its exit status."""
    with user_errors():
        options, environ = parse(make_parser(description), sys.argv[1:]), dict(os.environ)
        job, claim = make_plan(options, environ, cards := host.count_cards(environ))
        with claim:
            if not options.dry_run:
                return run(job)
    with contextlib.suppress(BrokenPipeError), open(1, "wb", closefd=False) as output:  # as before `head`
        output.write(job.describe(cards).encode(errors="surrogateescape") + b"\n")
    return 0

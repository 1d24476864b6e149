#!/usr/bin/env python
"""Run a training script on one card or many, on one host or several.

    python gaudi_spawn.py --world_size 8 --use_mpi run_clm.py --model_name_or_path gpt2 ...
    python gaudi_spawn.py --world_size 8 --use_deepspeed run_clm.py --deepspeed configs/deepspeed/zero_2.json ...
    python gaudi_spawn.py --hostfile hosts --world_size 16 --use_deepspeed run_clm.py ...

Without --use_mpi and --use_deepspeed, torch.distributed starts the ranks. Options before the script's name are the
launcher's; everything after it is the script's, and reaches every rank as it was typed.
"""

from __future__ import annotations

import signal

# Until a job takes it over: KeyboardInterrupt in the middle of an import may be swallowed, and the signal with it.
signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from gaudi_lm import hostfile, launch, placement, supervise
from gaudi_lm.runtime import UserError, user_errors


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the options)")


def world_size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks, at least 1")
    return int(text)


def port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gaudi_spawn.py",
        usage="gaudi_spawn.py [options] SCRIPT [the script's own flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--world_size",
        type=world_size,
        metavar="N",
        help="number of ranks, one card each (default: 1, or the hostfile's)",
    )
    add("--use_mpi", action="store_true", help="start the ranks with Open MPI's mpirun, version 4 or 5")
    add("--use_deepspeed", action="store_true", help="start the ranks with DeepSpeed's launcher")
    add("--hostfile", metavar="FILE", help="several hosts: lines of '[user@]host slots=N', as DeepSpeed reads them")
    add("--master_port", type=port, metavar="PORT", help="port of rank 0 where the ranks meet (default: a free one)")
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="an environment variable for all ranks, on all hosts; again for more. Those of Gaudi (PT_*, HABANA_*, "
        "HCCL_*, HF_*, OMP_*) and paths go along by themselves, tokens, keys and passwords only when named here",
    )
    add("--log_dir", metavar="DIR", help="keep one file with the output of each rank; the terminal shows rank 0")
    add("--grace", type=seconds, default=30.0, metavar="S", help="seconds between a signal and SIGKILL (default: 30)")
    add(
        "--map_by",
        choices=("socket", "slot", "none"),
        default="socket",
        help="pin ranks to CPUs by socket and core, or in order of CPU number, or not at all (default: socket)",
    )
    add("--dry_run", action="store_true", help="print hosts, ranks, cards, command and environment; start nothing")
    add("script", nargs="?", metavar="SCRIPT", help="the script that every rank runs")
    add("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own flags")
    return parser


def make_plan(options: argparse.Namespace, cards: int) -> tuple[launch.Plan, ExitStack]:
    """Check the options against one another, the hostfile and this host; the plan, and what to hold while it runs.

    Raises:
        UserError: naming the option and the way out.
    """
    if options.use_mpi and options.use_deepspeed:
        raise UserError("--use_mpi and --use_deepspeed: choose one of them")
    engine = "mpi" if options.use_mpi else "deepspeed" if options.use_deepspeed else "torch"
    if options.script is None:
        raise UserError("no script: gaudi_spawn.py [options] SCRIPT [the script's own flags]")
    if not Path(options.script).is_file():
        raise UserError(f"{options.script}: no such script")
    if options.hostfile is not None:
        if engine == "torch":
            raise UserError("--hostfile needs --use_deepspeed or --use_mpi: torch.distributed serves one host")
        hosts = hostfile.read_hostfile(options.hostfile)
        slots = sum(host.slots for host in hosts)
        if options.world_size not in (None, slots):
            raise UserError(
                f"--world_size {options.world_size}, but {options.hostfile} has {slots} slots on {len(hosts)} hosts"
            )
    else:
        hosts = (hostfile.Host(placement.this_host(), options.world_size or 1),)
    local = tuple(options.hostfile is None or placement.is_local(host.name) for host in hosts)
    if sum(local) > 1:
        names = " and ".join(host.name for host, here in zip(hosts, local, strict=True) if here)
        raise UserError(f"--hostfile {options.hostfile}: {names} are all this host; give it one line")
    ranks_here = sum(host.slots for host, here in zip(hosts, local, strict=True) if here)
    placement.check_cards(cards, ranks_here, options.arguments)
    program, version = launch.find_engine(engine)
    address = hosts[0].name
    if all(local):
        address = "127.0.0.1"
    elif local[0]:
        address = placement.address_towards(hosts[local.index(False)].name)
    port, claim = placement.choose_port(options.master_port, address, here=local[0])
    session_folder = path = ""
    if engine == "mpi":
        folder = tempfile.TemporaryDirectory(prefix="gaudi_spawn-", ignore_cleanup_errors=True)
        session_folder = claim.enter_context(folder)
        if any(":" in host.name for host in hosts):
            path = os.path.join(session_folder, "hosts")
            Path(path).write_text(launch.mpi_hostfile(hosts))
    plan = launch.Plan(
        engine=engine,
        hosts=hosts,
        script=(options.script, *options.arguments),
        master_address=address,
        master_port=port,
        engine_version=version,
        engine_program=program,
        folder=os.getcwd(),
        local=local,
        mpi_hostfile=path,
        session_folder=session_folder,
    )
    return plan, claim


def main() -> int:
    with user_errors():
        options = make_parser().parse_args()
        environ = dict(os.environ)
        named = launch.named_variables(options.env, environ)
        cards = placement.count_cards(environ)
        plan, claim = make_plan(options, cards)
        log_dir = None
        if options.log_dir is not None:
            log_dir = os.path.abspath(options.log_dir)
            if not options.dry_run:
                try:
                    os.makedirs(log_dir, exist_ok=True)
                except OSError as error:
                    raise UserError(f"--log_dir {options.log_dir}: {error.strerror.lower()}") from error
        forwarded = launch.forwarded_variables(environ, named)
        rank_environ = launch.rank_environment(plan, forwarded, options.arguments)
    if options.dry_run:
        claim.close()
        commands = launch.engine_commands(plan, forwarded)
        cpus = len(os.sched_getaffinity(0))
        threads = placement.threads_per_rank(cpus, max(1, plan.ranks_here()), placement.cpu_quota())
        text = launch.describe(plan, cards, threads, commands, rank_environ)
        sys.stdout.buffer.write(text.encode(errors="surrogateescape") + b"\n")
        return 0
    job = supervise.Job(
        plan,
        forwarded,
        rank_environ,
        launch.engine_environment(plan, environ, named),
        grace=options.grace,
        log_dir=log_dir,
        map_by=options.map_by,
    )
    with claim:
        return job.run()


if __name__ == "__main__":
    sys.exit(main())

"""Which card a run uses, and the environment it needs before torch is imported.

The scripts call :func:`choose_card` first, then import the rest; nothing here imports torch.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from gaudi_lm.config_files import expand_config_file, split_flag
from gaudi_lm.errors import UserError, memory_errors, user_errors
from gaudi_lm.interruptions import end_by_default, end_children, end_on_signals, ended_by_signals
from gaudi_lm.optimum_imports import import_in_parts

_SECONDS = 5  # that ranks wait for each other before they end with an error
_THRESHOLDS = gc.get_threshold()
UNREADABLE = (UserError, OSError, ValueError, ImportError)  # of a command line and its configuration file


def run_script(main: Callable[[], object]) -> None:
    """Run ``main`` as the whole of this process: user errors in one line, and a sure end of several ranks.

    Where ranks talk to each other, or for a signal, this does not return: ranks wait for each other, then the process
    ends as those of `multiprocessing` do: threads, exit handlers, open streams, ``os._exit``. In torch 2.13 no other
    ending of several ranks is sure.
    A thread of gloo that is done with a collective lets go of a Python object (what `torch.autograd` keeps for its
    threads), for which it needs the interpreter's lock. The group's destructor holds that lock while it waits for the
    thread: after `destroy_process_group` a deadlock, wherever DistributedDataParallel, a trainer or a traceback has
    the last reference. Where the interpreter is torn down first, the thread takes the process down with SIGABRT.
    ``main`` therefore leaves the group alone.
    """
    status: str | int | None = None
    gc.freeze()  # what was imported stays, and processes that load data share it
    gc.set_threshold(*_THRESHOLDS)
    if os.environ.get("WORLD_SIZE", "1") == "1":  # a rank may wait for others, and Python's handlers with it
        end_on_signals()
    try:
        with user_errors(), memory_errors(), ended_by_signals():
            main()
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        if not _has_process_group():
            raise
        sys.excepthook(*sys.exc_info())
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    end_by_default()
    by_signal = isinstance(status, int) and status > 128  # whoever sent it waits for no upload in a thread
    if not (_has_process_group() or by_signal):
        sys.exit(status)
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    if not status:
        # Rank 0 may hold the store that the others use, and a card may still be at the last collective.
        _meet()
    elif status == UserError.status:  # a mistake is that of all ranks, and some are slower
        meeting = threading.Thread(target=_meet, daemon=True)
        meeting.start()
        meeting.join(_SECONDS)
    if by_signal:
        end_children()
    else:
        threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()  # closes forgotten files
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None as with >&-
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads any more, or the disk is full: what Python says then
            status = status or 120
    os._exit(status or 0)


def _meet() -> None:
    with suppress(Exception):  # where another rank has failed instead, there is nothing to wait for
        sys.modules["torch"].distributed.barrier()


def _say_interrupted(kind: type[BaseException], error: BaseException, trace) -> None:
    """For ``sys.excepthook``: Ctrl-C while libraries are imported is no error to be traced."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _has_process_group() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def parse_bool(text: str) -> bool:
    """``true``/``yes``/``on``/``1`` and ``false``/``no``/``off``/``0`` in any case."""
    lowered = text.lower()
    if lowered in ("true", "t", "yes", "y", "on", "1"):
        return True
    if lowered in ("false", "f", "no", "n", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def simulated_cards() -> int:
    """The number of simulated cards that ``GAUDI_SIMULATOR`` asks for; 0 where it is unset.

    Raises:
        UserError: the value is not a whole number of at least 1.
    """
    text = os.environ.get("GAUDI_SIMULATOR", "")
    if not text:
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"GAUDI_SIMULATOR is {text!r}: it holds the number of simulated cards, at least 1")
    return int(text)


def wanted_card(arguments: list[str]) -> tuple[bool, bool]:
    """Whether a script's flags, on its command line or in its configuration file, ask for the CPU, and for a Gaudi."""
    try:
        flags = _card_flags(expand_config_file(arguments))
    except UNREADABLE:  # of another script perhaps, or for the script to report
        return False, False
    return bool(flags.use_cpu), bool(flags.use_habana)


def set_mpi_places() -> None:
    """Under mpirun alone, give its ranks the variables that torchrun and DeepSpeed set.

    Where the ranks of several hosts meet, ``MASTER_ADDR``, is for the user to say.
    """
    if "RANK" in os.environ or "OMPI_COMM_WORLD_RANK" not in os.environ:
        return
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = os.environ[f"OMPI_COMM_WORLD_{name.replace('WORLD_', '')}"]
    if os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"]:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")


def real_frameworks() -> bool:
    """Whether a ``habana_frameworks`` that is not the simulator's stand-in can be imported."""
    import gaudi_simulator

    spec = importlib.util.find_spec("habana_frameworks")
    if spec is None:
        return False
    locations = [*(spec.submodule_search_locations or []), spec.origin or ""]
    return not any(location.startswith(gaudi_simulator.STAND_IN) for location in locations)


def add_stand_in() -> None:
    """Make ``habana_frameworks`` importable, here and in child processes, on a host that lacks it.

    The stand-in goes to the end of both paths, so that a real package always wins.
    """
    import gaudi_simulator

    if gaudi_simulator.STAND_IN not in sys.path:
        sys.path.append(gaudi_simulator.STAND_IN)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if gaudi_simulator.STAND_IN not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([*paths, gaudi_simulator.STAND_IN])


def _card_flags(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names = ("use_habana", "use_cpu", "use_lazy_mode", "torch_compile")
    for name in names:
        parser.add_argument(f"--{name}", nargs="?", const=True, default=None, type=parse_bool)
    parser.add_argument("--torch_compile_backend")
    full = []
    for word in argv:
        name, equals, value = split_flag(word)
        name = name.replace("--no_cuda", "--use_cpu")
        meant = [f"--{flag}" for flag in names if len(name) > 2 and f"--{flag}".startswith(name)]
        # A beginning that other flags share is refused later, by the parser that knows them all.
        full.append(f"{meant[0]}{equals}{value}" if len(meant) == 1 else word)
    try:
        parser.exit_on_error = False
        return parser.parse_known_args(full)[0]
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error


def _set_lazy_mode(flags: argparse.Namespace) -> None:
    """PT_HPU_LAZY_MODE must stand in the environment before torch is imported; the user's own value wins."""
    own = os.environ.get("PT_HPU_LAZY_MODE")
    compiled = bool(flags.torch_compile or flags.torch_compile_backend)
    wanted = not compiled if flags.use_lazy_mode is None else flags.use_lazy_mode
    if own is None:
        os.environ["PT_HPU_LAZY_MODE"] = "1" if wanted else "0"
    elif flags.use_lazy_mode is not None and (own != "0") != wanted:
        raise UserError(
            f"--use_lazy_mode {wanted} contradicts PT_HPU_LAZY_MODE={own} in the environment: change one of the two"
        )


def choose_card(argv: list[str], name: str = "__main__") -> None:
    """Prepare the environment for the card that the flags ask for; call it before torch is imported.

    ``--use_cpu`` wins over ``--use_habana``. Ends the process with exit code 2 and one line where the flags ask for a
    card that is not there. Flags that choose no card at all are left to the argument parser, which also serves
    ``--help``.

    Args:
        name: the ``__name__`` of the script. One that is imported has the command line of another program, of which
            it takes the flags that it can read.
    """
    sys.excepthook = _say_interrupted
    with user_errors():
        set_mpi_places()
        try:
            flags = _card_flags(expand_config_file(argv))
        except UNREADABLE:
            if name == "__main__":
                raise
            flags = _card_flags([])
        cards = simulated_cards()
        real = real_frameworks()
        if flags.use_cpu:
            # Child processes (data loaders, launchers) must not see a card either.
            os.environ.pop("GAUDI_SIMULATOR", None)
            # accelerate imports an installed DeepSpeed, which would look for the card that the stand-in names.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        elif real and cards:
            raise UserError(
                "GAUDI_SIMULATOR is set on a host that has a real habana_frameworks: unset it to use the real cards"
            )
        elif flags.use_habana and not real and not cards:
            raise UserError(
                "--use_habana: this host has no Gaudi software (habana_frameworks). Rehearse on simulated cards with "
                "GAUDI_SIMULATOR=1 in the environment, or append --use_cpu to run on the CPU"
            )
        elif flags.use_habana:
            _set_lazy_mode(flags)
        if not real:
            add_stand_in()
            # Where there is no Gaudi, a warning at every start that hl-smi is missing says nothing new.
            logging.getLogger("optimum.habana.utils.misc").setLevel(logging.ERROR)
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        # Otherwise `datasets` reports each use of a hub dataset to an address outside the hub.
        os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        # Read when tqdm is imported: what is over in a moment needs no bar, and a file no bar ten times a second.
        os.environ.setdefault("TQDM_DELAY", "3")
        os.environ.setdefault("TQDM_MININTERVAL", "0.1" if sys.stderr and sys.stderr.isatty() else "15")
    import_in_parts()
    gc.set_threshold(100_000, *_THRESHOLDS[1:])  # to look through all that is imported takes a tenth of the imports


def set_up_logging(main_rank: bool, level: int | None = None, bars: bool = True) -> logging.Logger:
    """One line a fact, and bars for what takes long, on stderr, from the main rank only.

    Args:
        level: of our own log and of the libraries'; by default the main rank's facts and the libraries' warnings.
        bars: whether the libraries show bars; off a terminal, those of a quarter of a minute and more.

    Returns:
        The logger that the scripts share.
    """
    import datasets
    import transformers

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logger = logging.getLogger("gaudi_lm")
    logger.setLevel(level or (logging.INFO if main_rank else logging.ERROR))
    libraries = level or (logging.WARNING if main_rank else logging.ERROR)
    # All come through our handler; left alone, each has a format of its own, and transformers prints twice where CI is
    # set. DeepSpeed is imported by now where a run needs it.
    for name in ("transformers", "datasets", "huggingface_hub", "optimum", "DeepSpeed"):
        library = logging.getLogger(name)
        library.setLevel(libraries)
        library.propagate = True
        library.handlers.clear()
    # It warns of each function that DeepSpeed's Muon compiles, whatever the optimizer.
    logging.getLogger("transformers.utils.import_utils").setLevel(level or logging.ERROR)
    if not (main_rank and bars):
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    return logger

"""Environment variables of a job: which of them its ranks get on every host, and which are secret."""

from __future__ import annotations

import fnmatch
import os
import re

from gaudi_lm.config_files import split_flag
from gaudi_lm.errors import UserError
from gaudi_simulator import STAND_IN

FORWARDED = ["PT_*", "HABANA_*", "HCCL_*", "HF_*", "OMP_*", "GAUDI_SIMULATOR", "LD_LIBRARY_PATH", "PYTHONPATH"]
FORWARDED += ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"]
SECRET = ["*TOKEN", "*_KEY", "*PASSWORD*", "*SECRET*"]
TOKENS = ("--token", "--hub_token", "--push_to_hub_token")
# Left over from a job around this one, these would give the ranks wrong places.
STALE = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "ROLE_RANK"]
STALE += ["MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_*", "OMPI_COMM_WORLD_*", "PMI_*", "GAUDI_SPAWN_JOB"]
STALE += ["CROSS_RANK", "CROSS_SIZE", "PMIX_[!M]*"]  # PMIX_MCA_* are a user's settings of mpirun
STALE += ["PET_*"]  # options of torchrun, as a PyTorchJob of Kubernetes sets them


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_secret(name: str) -> bool:
    """Whether a variable or flag of this name may hold a token, a key or a password."""
    return matches(name.upper().replace("-", "_"), SECRET)


def is_secret_flag(word: str) -> bool:
    """Whether a word is a flag for a token, a key or a password; those of the scripts may be abbreviated."""
    flag = split_flag(word)[0]
    short = len(flag) > 3 and flag != "--push_to_hub" and any(full.startswith(flag) for full in TOKENS)
    return flag.startswith("--") and (short or is_secret(flag))


def hide(words: tuple[str, ...]) -> list[str]:
    """Arguments with asterisks for the values of flags such as ``--hub_token``."""
    shown, follows = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = is_secret_flag(word)
        shown.append("***" if follows and not word.startswith("--") else f"{name}=***" if secret and equals else word)
        follows = secret and not equals
    return shown


def named_variables(options: list[str], environ: dict) -> dict[str, str]:
    """``--env`` options as variables; a :class:`UserError` for what is not set, no name, or a secret in the open."""
    named = {}
    for name, equals, value in (option.partition("=") for option in options):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env {name!r}: not the name of an environment variable")
        if matches(name, STALE):
            raise UserError(f"--env {name}: the launcher places the ranks; --master_port and --world_size are options")
        if equals and is_secret(name):
            raise UserError(f"--env {name}=...: ps shows it to everybody; export {name} and give --env {name}")
        if not equals and name not in environ:
            raise UserError(f"--env {name}: not set in the environment; export it or give --env {name}=VALUE")
        named[name] = value if equals else environ[name]
    return named


def rank_environment(environ: dict, named: dict[str, str], on_cpu: bool) -> dict[str, str]:
    """The variables that all ranks get, on every host: those of Gaudi, paths and threads, and the named ones."""
    chosen = {n: value for n, value in environ.items() if matches(n, FORWARDED) and not is_secret(n)} | named
    if chosen.get("GAUDI_SIMULATOR") and not on_cpu:
        # Last, so that a real habana_frameworks wins.
        paths = [path for path in chosen.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", STAND_IN)]
        chosen["PYTHONPATH"] = os.pathsep.join([*paths, STAND_IN])
    return chosen

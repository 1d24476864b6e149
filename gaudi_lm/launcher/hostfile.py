"""Hostfiles: which hosts take part in a job, and with how many ranks."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from gaudi_lm.errors import UserError

HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile: where to log in, and how many ranks run there."""

    name: str
    slots: int
    user: str = ""

    @property
    def login(self) -> str:
        return f"{self.user}@{self.name}" if self.user else self.name


def parse_hostfile(text: str, path: str) -> tuple[Host, ...]:
    """Hosts in DeepSpeed's grammar: ``[user@]name slots=N`` a line, ``#`` comments; a UserError has the line."""
    found: dict[str, tuple[int, Host]] = {}
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        where = f"--hostfile {path}, line {number}"
        if len(words) != 2 or not words[1].startswith("slots="):
            raise UserError(f"{where}: expected 'HOST slots=N', got {line.strip()!r}")
        count = words[1].removeprefix("slots=")
        if not re.fullmatch(r"[0-9]{1,6}", count) or int(count) < 1:
            raise UserError(f"{where}: slots={count}: expected a whole number of cards, at least 1")
        user, at, name = words[0].rpartition("@")
        if at and not HOST_NAME.fullmatch(user):
            raise UserError(f"{where}: {words[0]!r}: {user!r} is not a user name")
        name = name[1:-1] if name.startswith("[") and name.endswith("]") else name
        if not HOST_NAME.fullmatch(name) or re.fullmatch(r"[0-9.]+", name):
            try:
                ipaddress.ip_address(name)
            except ValueError:
                raise UserError(f"{where}: {words[0]!r} is neither a host name nor an IP address") from None
        if name.lower() in found:
            raise UserError(f"{where}: host {name!r} is already on line {found[name.lower()][0]}")
        found[name.lower()] = number, Host(name, int(count), user)
    if not found:
        raise UserError(f"--hostfile {path}: names no host; expected lines of 'HOST slots=N'")
    return tuple(host for _, host in found.values())


def read_hostfile(path: str) -> tuple[Host, ...]:
    """:func:`parse_hostfile` on a file; also a :class:`UserError` where it cannot be read or is no text."""
    try:
        return parse_hostfile(Path(path).read_bytes().decode(), path)
    except (UnicodeDecodeError, OSError) as error:
        what = str(error.strerror).lower() if isinstance(error, OSError) else "not a text file"
        raise UserError(f"--hostfile {path}: {what}") from error

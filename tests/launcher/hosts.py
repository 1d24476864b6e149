"""Two hosts on one machine: namespaces for network, mounts and host name, joined by a cable, an sshd in each."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def require_programs() -> None:
    """Install what is missing, or fail and say by name what to install."""
    if os.geteuid() != 0:
        raise RuntimeError("two hosts on one machine need network namespaces: run these tests as root")
    said = ""
    # Another worker may be installing just now: a program is there before its package is set up.
    with open(Path(tempfile.gettempdir(), "gaudi-lm-packages.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = {package for program, package in PROGRAMS.items() if not shutil.which(program, path=SEARCH)}
        if missing and shutil.which("apt-get"):
            for command in (["update", "-q"], ["install", "-qy", "-oDPkg::Lock::Timeout=120", *missing]):
                done = subprocess.run(["apt-get", *command], capture_output=True, text=True, check=False)
                said += done.stderr
            missing = {package for program, package in PROGRAMS.items() if not shutil.which(program, path=SEARCH)}
    if missing:
        names = ", ".join(sorted(missing))
        raise RuntimeError(f"two hosts on one machine need the Debian packages {names}\n{said}")


@dataclass
class SimulatedHost:
    """One host: enter it with :meth:`inside`."""

    name: str
    address: str
    address6: str
    process: subprocess.Popen
    sshd: subprocess.Popen | None = None
    others: list[int] = field(default_factory=list)

    def inside(self, *command: str) -> list[str]:
        """``command``, to be run in this host."""
        return ["nsenter", "-t", str(self.process.pid), "-n", "-m", "-u", *command]

    def run(self, *command: str) -> None:
        subprocess.run(self.inside(*command), check=True, capture_output=True)

    def cable(self, state: str) -> None:
        """Set the link ``up`` or ``down``."""
        self.run("ip", "link", "set", "cable", state)

    def wait_for_sshd(self) -> None:
        """Until it listens: by IPv4 and IPv6, as the kernel lists it."""
        deadline = time.monotonic() + 60
        tables = [Path(f"/proc/{self.process.pid}/net/{name}") for name in ("tcp", "tcp6")]
        while not all(re.search(r": 0+:0016 0+:0000 0A ", table.read_text()) for table in tables):
            if time.monotonic() > deadline or self.sshd.poll() is not None:
                raise RuntimeError(f"no sshd on {self.name}")
            time.sleep(0.02)

    def stop_sshd(self) -> None:
        """End the sshd with all its sessions, and nothing that runs below them."""
        pids = [self.sshd.pid]
        for pid in pids:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            pids += [int(c) for c in children if Path(f"/proc/{c}/comm").read_text().startswith("sshd")]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # a session may end with the one above it
                os.kill(pid, signal.SIGKILL)
        self.sshd.wait()


def start_host(name: str, address: str, folder: Path) -> SimulatedHost:
    process = subprocess.Popen(["unshare", "-n", "-m", "-u", "sleep", "infinity"])
    host = SimulatedHost(name, address, f"fd77::{address[-1]}", process)
    deadline = time.monotonic() + 60
    while os.readlink(f"/proc/{process.pid}/ns/uts") == os.readlink("/proc/self/ns/uts") or not Path(
        f"/proc/{process.pid}/comm"
    ).read_text().startswith("sleep"):
        if time.monotonic() > deadline:
            raise RuntimeError("no namespaces here: two hosts on one machine need CAP_SYS_ADMIN")
        time.sleep(0.02)
    host.run("hostname", name)
    host.run("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
    host.run("mount", "--bind", str(folder / "ssh_config"), "/etc/ssh/ssh_config")
    host.run("ip", "link", "set", "lo", "up")
    return host


@contextlib.contextmanager
def two_hosts(folder: Path, sshd_lines: str = "") -> Iterator[tuple[SimulatedHost, SimulatedHost]]:
    """``hosta`` and ``hostb``, each able to log in to the other; gone at the end."""
    require_programs()
    names = {"hosta": "10.77.0.1", "hostb": "10.77.0.2"}
    folder.mkdir(exist_ok=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in names.items()))
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/key\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
        "  LogLevel ERROR\n"
    )
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin prohibit-password\nMaxStartups 100\nPidFile none\n" + sshd_lines
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        hosts = []
        for name, address in names.items():
            host = start_host(name, address, folder)
            stack.callback(host.process.wait)
            stack.callback(host.process.kill)
            hosts.append(host)
        first, second = hosts
        subprocess.run(
            ["ip", "link", "add", "cable", "netns", str(first.process.pid), "type", "veth"]
            + ["peer", "name", "cable", "netns", str(second.process.pid)],
            check=True,
        )
        sshd = shutil.which("sshd", path=SEARCH)
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "cable")
            host.run("ip", "address", "add", f"{host.address6}/64", "dev", "cable", "nodad")
            host.cable("up")
            host.sshd = subprocess.Popen(
                host.inside(sshd, "-D", "-e", "-f", str(folder / "sshd_config")), stderr=subprocess.DEVNULL
            )
            stack.callback(host.sshd.wait)
            stack.callback(host.sshd.kill)
        for host in hosts:
            host.wait_for_sshd()
        yield first, second

"""A hub on loopback that speaks as much of the Hugging Face API as `huggingface_hub` and `datasets` use.

Written against huggingface_hub 0.36 and datasets 5.0.1: model and dataset information, references, trees, path
information, and files with ETag, revision, byte ranges and the redirect of large files to another address. It also
poses as the proxy to everywhere else, refuses, and remembers what was asked for. `Hub.environment` points a child
process at it; the variables are read when the libraries are imported.
"""

import ctypes
import hashlib
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE_FILE_SUFFIXES = {".bin", ".parquet", ".safetensors"}
NAME = r"((?:[\w.-]+/)?[\w.-]+?)"
API = re.compile(rf"/api/(models|datasets)/{NAME}(?:/(refs|revision|tree|paths-info)(?:/([^/]+)(?:/(.*))?)?)?")
RESOLVE = re.compile(rf"/(datasets/)?{NAME}/resolve/([^/]+)/(.+)")
LARGE = re.compile(rf"/large/(models|datasets)/{NAME}/([0-9a-f]{{40}})/(.+)")
BYTE_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class File:
    """One file of a revision. `oid` is the git blob id, `sha256` is set for files that the hub keeps outside git."""

    path: str
    content: Path

    @cached_property
    def size(self) -> int:
        return self.content.stat().st_size

    @cached_property
    def oid(self) -> str:
        data = self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @cached_property
    def sha256(self) -> str | None:
        if self.content.suffix not in LARGE_FILE_SUFFIXES:
            return None
        return hashlib.sha256(self.content.read_bytes()).hexdigest()

    def entry(self) -> dict:
        """The file as the tree and paths-info answers show it."""
        entry = {"type": "file", "path": self.path, "size": self.size, "oid": self.oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Revision:
    """The files of a branch at its only commit; `commit` is a digest of their names and contents."""

    folder: Path

    @cached_property
    def files(self) -> dict[str, File]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): File(str(path.relative_to(self.folder)), path) for path in paths}

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1("".join(f"{file.oid} {path}\n" for path, file in self.files.items()).encode()).hexdigest()

    def entry(self, path: str) -> dict | None:
        """The tree entry of a file or folder, None when there is neither."""
        if path in self.files:
            return self.files[path].entry()
        if any(name.startswith(path + "/") for name in self.files):
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        return None

    def tree(self, folder: str, recursive: bool) -> list[dict]:
        """The entries under a folder ("" for the top)."""
        prefix = folder + "/" if folder else ""
        paths = set()
        for name in self.files:
            if name.startswith(prefix):
                parts = name[len(prefix) :].split("/")
                depths = range(1, len(parts) + 1) if recursive else [1]
                paths |= {prefix + "/".join(parts[:depth]) for depth in depths}
        return [self.entry(path) for path in sorted(paths)]


@dataclass
class Cut:
    """A transfer of a file that breaks off after `after` bytes of the body, the next `times` times that it is sent."""

    path: str
    after: int
    times: int


def enter_network(pid: int | None) -> None:
    """Move the calling thread into the network namespace of a process."""
    if pid is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as namespace:
        if libc.setns(namespace.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), "setns")


class Served:
    """A server that runs in a thread while a ``with`` lasts."""

    _server: ThreadingHTTPServer

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Hub(Served):
    """What is served and what was asked.

    `root` holds `models/<owner>/<name>/<branch>/...` and the same under `datasets`. `moved` maps an old name, like
    `("datasets", "wikitext")`, to the present one; requests for the old one are redirected. Repositories in `gated`
    are served only to a bearer of one of `tokens`. `cuts` are transfers to break off. The hub listens on `address`, in
    the network namespace of the process `namespace` if that is given. `log` lists (method, path, status, token), in
    order.
    """

    root: Path
    moved: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)
    cuts: list[Cut] = field(default_factory=list)
    address: str = "127.0.0.1"
    namespace: int | None = None
    log: list[tuple[str, str, int, str | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        hub = self

        class BoundHandler(Handler):
            pass

        BoundHandler.hub = hub
        self._revisions: dict[tuple[str, str, str], Revision] = {}
        self._lock = threading.Lock()

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            # Sixteen ranks ask at once, each over several connections.
            request_queue_size = 256

        # A socket stays in the namespace of the thread that made it.
        with ThreadPoolExecutor(1, initializer=enter_network, initargs=(self.namespace,)) as thread:
            self._server = thread.submit(Server, (self.address, 0), BoundHandler).result()

    @property
    def url(self) -> str:
        """The address for HF_ENDPOINT."""
        return f"http://{self.address}:{self._server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a child process that knows no other hub, has its caches in `home` and no way out."""
        left_out = ("HF_", "HUGGING_FACE_", "PYTEST", "PYTHONPATH")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        proxies = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"], self.url)
        direct = dict.fromkeys(["NO_PROXY", "no_proxy"], f"{self.address},localhost")
        # Many ranks on few processors are slow to read an answer; the clients give up after 10 s by default.
        patience = {"HF_HUB_ETAG_TIMEOUT": "120", "HF_HUB_DOWNLOAD_TIMEOUT": "120"}
        return inherited | proxies | direct | patience | {"HF_ENDPOINT": self.url, "HF_HOME": str(home)}

    @property
    def escapes(self) -> list[str]:
        """What was asked for beyond this hub, and requests that are no download: telemetry, discussions, ..."""
        return [f"{method} {path}" for method, path, status, _ in self.log if status == 403]

    def branches(self, kind: str, name: str) -> list[str]:
        """The branches of a repository, empty when there is no such repository."""
        folder = self.root / kind / name
        is_repository = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and folder.is_dir()
        return sorted(path.name for path in folder.iterdir()) if is_repository else []

    def revision(self, kind: str, name: str, revision: str) -> Revision | None:
        """The revision named by a branch or by a commit id, None when there is none."""
        for branch in self.branches(kind, name):
            key = (kind, name, branch)
            with self._lock:
                found = self._revisions.setdefault(key, Revision(self.root / kind / name / branch))
            if revision in (branch, f"refs/heads/{branch}", found.commit):
                return found
        return None

    def next_cut(self, path: str) -> int | None:
        """After how many bytes to break off this transfer, None to complete it."""
        with self._lock:
            for cut in self.cuts:
                if cut.times > 0 and path.endswith(cut.path):
                    cut.times -= 1
                    return cut.after
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection to a `Hub`."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args) -> None:
        """Nothing on stderr: `Hub.log` holds the requests."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_CONNECT(self) -> None:
        self.send(403, {"error": "Nothing but this hub can be reached, and nothing but repositories on it."})

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        form = parse_qs(body.decode()) if body[:1] != b"{" else json.loads(body)
        query = parse_qs(url.query)
        if match := LARGE.fullmatch(path):
            kind, name, commit, file = match.groups()
            self.send_file(self.hub.revision(kind, name, commit).files[file])
        elif match := API.fullmatch(path):
            kind, name, action, revision, inner = match.groups()
            if self.admits(kind, name, url):
                self.answer_api(kind, name, action, revision or "main", inner or "", query | form)
        elif match := RESOLVE.fullmatch(path):
            datasets, name, revision, file = match.groups()
            kind = "datasets" if datasets else "models"
            if self.admits(kind, name, url):
                self.answer_resolve(kind, name, revision, file)
        else:
            self.do_CONNECT()

    def admits(self, kind: str, name: str, url) -> bool:
        """Answer a request for a moved, absent or gated repository; True when it is there for this client."""
        if new := self.hub.moved.get((kind, name)):
            location = url.path.replace(quote(name), new, 1) + (f"?{url.query}" if url.query else "")
            self.send(307, {}, {"Location": location})
        elif self.token and self.token not in self.hub.tokens:
            self.send_error_code(401, "", "Invalid credentials in Authorization header")
        elif not self.hub.branches(kind, name):
            # The hub does not tell a stranger whether a repository is private or absent.
            self.send_error_code(404 if self.token else 401, "RepoNotFound", "Repository not found")
        elif name in self.hub.gated and not self.token and "/resolve/" in url.path:
            message = f"Access to model {name} is restricted. You must have access to it and be authenticated."
            self.send_error_code(401, "GatedRepo", message)
        else:
            return True
        return False

    def answer_api(self, kind: str, name: str, action: str, revision: str, inner: str, arguments: dict) -> None:
        if action == "refs":
            branches = self.hub.branches(kind, name)
            commits = {branch: self.hub.revision(kind, name, branch).commit for branch in branches}
            heads = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in commits.items()]
            self.send(200, {"branches": heads, "tags": [], "converts": []})
            return
        found = self.hub.revision(kind, name, revision)
        if found is None:
            self.send_error_code(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif action == "tree":
            if inner and found.entry(inner) is None:
                self.send_error_code(404, "EntryNotFound", f"{inner} does not exist on {revision}")
            else:
                recursive = arguments.get("recursive", ["false"])[0].lower() in ("true", "1")
                self.send(200, found.tree(inner, recursive))
        elif action == "paths-info":
            paths = arguments.get("paths", [])
            entries = [found.entry(path) for path in ([paths] if isinstance(paths, str) else paths)]
            self.send(200, [entry for entry in entries if entry])
        else:
            siblings = [{"rfilename": file.path, "size": file.size} for file in found.files.values()]
            gated = "manual" if name in self.hub.gated else False
            about = {"private": False, "gated": gated, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
            self.send(200, {"_id": found.commit[:24], "id": name, "sha": found.commit, "siblings": siblings} | about)

    def answer_resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self.hub.revision(kind, name, revision)
        if found is None:
            self.send_error_code(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif path not in found.files:
            self.send_error_code(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": found.commit})
        else:
            file = found.files[path]
            headers = {"X-Repo-Commit": found.commit, "ETag": f'"{file.oid}"'}
            if file.sha256:
                headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
                headers["Location"] = f"{self.hub.url}/large/{kind}/{name}/{found.commit}/{quote(path)}"
                self.send(302, {}, headers)
            else:
                self.send_file(file, headers)

    def send_file(self, file: File, headers: dict[str, str] | None = None) -> None:
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{file.sha256 or file.oid}"'} | (headers or {})
        data = file.content.read_bytes()
        status = 200
        if match := BYTE_RANGE.fullmatch(self.headers.get("Range", "")):
            start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
            if start >= len(data):
                self.send(416, {}, headers | {"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, status = data[start:stop], 206
        cut = self.hub.next_cut(file.path) if self.command == "GET" else None
        self.send(status, data, headers, cut)

    def send_error_code(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        codes = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        self.send(status, {"error": message}, codes | (headers or {}))

    def send(self, status: int, body, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        """Send an answer: bytes as they are, anything else as JSON; break off after `cut` bytes of it if given."""
        is_json = not isinstance(body, bytes)
        data = json.dumps(body).encode() if is_json else body
        self.hub.log.append((self.command, self.path, status, self.token))
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True

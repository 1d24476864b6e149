"""A hub on loopback that takes uploads, and fails as it is told.

Written against huggingface_hub 0.36: creation of repositories and branches, the question how each file is to be sent
(here always within the commit), commits, and what is there already.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hub.server import Served


class UploadHub(Served):
    """What has been uploaded: ``files[repository, revision][path]``; use it in a ``with``.

    Attributes:
        fault: ``"down"`` drops each connection, ``"denied"`` answers 401, ``"cut"`` drops connections in a commit.
        delay: seconds that the question how files are to be sent takes to answer.
        answering: cleared, that question gets no answer at all until it is set again.
    """

    def __init__(self):
        self.files: dict[tuple[str, str], dict[str, bytes]] = defaultdict(dict)
        self.created: dict[str, dict] = {}
        self.commits: list[str] = []
        self.fault: str | None = None
        self.delay = 0.0
        self.answering = threading.Event()
        self.answering.set()
        hub = self

        class Bound(_Handler):
            pass

        Bound.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True

    @property
    def environment(self) -> dict[str, str]:
        """For a run that knows no other hub, with a token that this one takes."""
        url = f"http://127.0.0.1:{self._server.server_port}"
        return {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1"}


class _Handler(BaseHTTPRequestHandler):
    hub: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self.answer(200, {"id": "me/x", "sha": "0" * 40, "siblings": []} if "/revision/" in self.path else {})

    def do_POST(self) -> None:
        if self.hub.fault == "down" or (self.hub.fault == "cut" and "/commit/" in self.path):
            self.close_connection = True
            self.connection.close()
            return
        body = (
            self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else self.chunks()
        )
        if self.hub.fault == "denied" or self.headers.get("Authorization") != "Bearer hf_writer":
            self.answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.hub.created[name] = wanted
            self.answer(200, {"url": f"http://{self.headers['Host']}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/?]+)", self.path):
            name, what, revision = found.groups()
            files = self.hub.files[name, revision]
            if what == "preupload":
                time.sleep(self.hub.delay)
                self.hub.answering.wait()
                asked = [file["path"] for file in json.loads(body)["files"]]
                self.answer(200, {"files": [self.known(path, files.get(path)) for path in asked]})
            elif what == "commit":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    else:
                        self.hub.commits.append(line["value"]["summary"])
                self.answer(
                    200, {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/1", "commitOid": "1" * 40}
                )
            else:
                self.answer(200, {})
        else:
            self.answer(404, {"error": self.path})

    @staticmethod
    def known(path: str, content: bytes | None) -> dict:
        oid = None if content is None else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oid}

    def chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        with contextlib.suppress(ConnectionError):  # of a run that was ended meanwhile
            self.end_headers()
            self.wfile.write(data)

"""A hub on localhost: the part of the Hugging Face hub's HTTP interface that downloads use.

It answers `HEAD` and `GET` of `/datasets/<repo>/resolve/<revision>/<file>` with the hub's headers,
honours `Range`, and can misbehave the way networks do.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import pytest
from huggingface_hub import constants


class Request(NamedTuple):
    """What was asked for."""

    method: str
    path: str
    token: str | None


@dataclass
class Hub:
    """What the server holds and how it behaves; both may change while it runs."""

    files: dict[str, bytes] = field(default_factory=dict)
    """By `<repo>/<commit>/<path>`."""
    branches: dict[str, str] = field(default_factory=dict)
    """Commit that a branch or tag stands for."""
    url: str = ""
    requests: list[Request] = field(default_factory=list)
    """All requests so far."""
    elsewhere: str | None = None
    """Address of this server under another host name, which large files are redirected to."""
    reset_after: int | None = None
    """Bytes of the body after which the connection is reset."""
    close_after: int | None = None
    """Bytes of the body after which the connection is closed in good order, once."""
    serve_instead: bytes | None = None
    """Body sent in place of the file's, whose headers stay."""
    refuse: tuple[int, str] | None = None
    """Status and error code (`X-Error-Code`) of every answer."""

    def put(self, repo: str, revision: str, path: str, content: bytes) -> None:
        """Store a file at a commit."""
        self.files[f"{repo}/{revision}/{path}"] = content

    def redirects(self, path: str) -> bool:
        """Return whether the answer names another host, as the hub's does for large files."""
        return self.elsewhere is not None and not path.startswith("/elsewhere")

    def find(self, path: str) -> tuple[str, bytes] | None:
        """Return the commit and the content that a URL's path names."""
        name, _, rest = (
            path.removeprefix("/elsewhere").removeprefix("/datasets/").partition("/resolve/")
        )
        revision, _, filename = rest.partition("/")
        commit = self.branches.get(revision, revision)
        content = self.files.get(f"{name}/{commit}/{filename}")
        return None if content is None else (commit, content)


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on a free port of localhost."""
    hub = Hub()

    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        hub = self.hub
        asked = self.headers.get("Range")
        hub.requests.append(Request(self.command, self.path, self.headers.get("Authorization")))
        found = hub.find(self.path)
        if hub.refuse or found is None:
            status, code = hub.refuse or (404, "EntryNotFound")
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        commit, content = found
        sent = content if hub.serve_instead is None or not body else hub.serve_instead
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        body = body and not hub.redirects(self.path)
        if hub.redirects(self.path):
            self.send_response(302)
            self.send_header("Location", f"{hub.elsewhere}/elsewhere{self.path}")
            self.send_header("Content-Length", "0")
        else:
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(sent) - start))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(sent) - 1}/{len(sent)}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.end_headers()
        if body:
            self._send(sent[start:])

    def _send(self, body: bytes) -> None:
        hub = self.hub
        if hub.reset_after is not None:
            self.wfile.write(body[: hub.reset_after])
            # Closing without lingering sends a reset, which overtakes what has not been read yet.
            Event().wait(0.1)
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        elif hub.close_after is not None:
            self.wfile.write(body[: hub.close_after])
            hub.close_after = None
            self.close_connection = True
        else:
            self.wfile.write(body)


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the hub's library, which reads its environment when imported, to a server and a cache."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

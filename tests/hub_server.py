"""A server on this machine that speaks the hub's protocol, for folders that stand for repositories."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


class HubServer(ThreadingHTTPServer):
    """Serves repositories.

    Attributes:
        repositories: For each id the folder of each revision; the commit's hash is derived from id and revision.
        gated: Ids whose files need the token "hf_good".
        cut: The name of a file, and after how many bytes its next download breaks off.
        ranges: Whether parts of files are sent.
        surplus: How many bytes are sent behind each part of a file that nobody asked for.
        size: What is said of the size of files of which parts are sent; None says the true one.
        answer: What is sent as the description of every repository, as bytes or as JSON; None sends the true one.
        log: Method, path and number of bytes sent of each request for a file.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.cut: tuple[str, int] | None = None
        self.ranges = True
        self.surplus = 0
        self.size: int | None = None
        self.answer: object = None
        self.log: list[tuple[str, str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repository: str, folder: Path, revision: str = "main") -> str:
        """Publish a folder, and return the commit's hash."""
        self.repositories.setdefault(repository, {})[revision] = folder
        return commit_of(repository, revision)

    def sent(self, suffix: str) -> int:
        """The bytes that were sent of files whose names end so."""
        return sum(count for _, path, count in self.log if path.endswith(suffix))


def commit_of(repository: str, revision: str = "main") -> str:
    """The hash of a revision's commit."""
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if match := _API.fullmatch(path):
            self._describe(match["id"], match["what"], unquote(match["revision"] or "main"))
        elif match := _FILE.fullmatch(path):
            self._file(match["id"], unquote(match["revision"]), unquote(match["name"]))
        else:
            self._refuse(404, "EntryNotFound")

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def _folder(self, repository: str, revision: str) -> tuple[Path, str] | None:
        revisions = self.server.repositories.get(repository)
        if revisions is None:
            self._refuse(401, "RepoNotFound")
            return None
        for name, folder in revisions.items():
            if revision in (name, commit := commit_of(repository, name)):
                return folder, commit
        self._refuse(404, "RevisionNotFound")
        return None

    def _describe(self, repository: str, what: str | None, revision: str) -> None:
        if (found := self._folder(repository, revision)) is None:
            return
        folder, commit = found
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        if what == "tree":
            entries = [_entry(name, file) for name, file in files.items()]
            self._json(entries)
            return
        if self.server.answer is not None:
            self._json(self.server.answer)
            return
        siblings = [{"rfilename": name, "size": file.stat().st_size} for name, file in files.items()]
        self._json({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "private": False})

    def _file(self, repository: str, revision: str, name: str) -> None:
        if (found := self._folder(repository, revision)) is None:
            return
        folder, commit = found
        if repository in self.server.gated and self.headers.get("Authorization") != "Bearer hf_good":
            self._refuse(403, "GatedRepo")
            return
        if not (folder / name).is_file():
            self._refuse(404, "EntryNotFound")
            return
        content = (folder / name).read_bytes()
        first, end = 0, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is not None and self.server.ranges:
            first = int(asked[1])
            end = min(end, int(asked[2]) + 1) if asked[2] else end
        is_part = asked is not None and self.server.ranges
        surplus = self.server.surplus if is_part else 0
        self.send_response(206 if is_part else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{_blob(content)}"')
        self.send_header("Accept-Ranges", "bytes")
        if is_part:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{self.server.size or len(content)}")
        self.send_header("Content-Length", str(end - first + surplus))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.cut
        if cut is not None and cut[0] == name and end == len(content):
            end, self.server.cut = first + cut[1], None
            self.close_connection = True
        self.wfile.write(content[first:end])
        with contextlib.suppress(OSError):  # who has asked may hang up
            self.wfile.write(bytes(surplus))
        self.server.log.append((self.command, f"{repository}/{name}", end - first))

    def _json(self, data: object) -> None:
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _blob(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _entry(name: str, file: Path) -> dict[str, object]:
    digest, size = _blob(file.read_bytes()), file.stat().st_size
    entry: dict[str, object] = {"type": "file", "path": name, "size": size, "oid": digest}
    if name.endswith((".safetensors", ".bin", ".gguf")):
        entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 134}
    return entry


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a server in a thread."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

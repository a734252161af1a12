"""A model hub on 127.0.0.1: what the hub's client asks of the real one, and a list of what was fetched."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
LARGE = (".safetensors", ".bin", ".msgpack", ".h5")


@dataclass
class Hub:
    address: str = ""
    fetched: set[str] = field(default_factory=set)
    """REPOSITORY/NAME of files whose content was asked for."""


@contextmanager
def serve(folders: Mapping[str, Path], refusal: tuple[int, str | None] | None = None) -> Iterator[Hub]:
    """Repository ▸ folder, each at COMMIT, its branch main. No name of a repository begins with another's.

    refusal: status and the hub's own word for it (GatedRepo, RepoNotFound, ...), its answer to whatever is asked."""
    hub = Hub()
    repositories = {name: {p.name: p.read_bytes() for p in sorted(folder.iterdir())} for name, folder in folders.items()}

    def entry(content: bytes, name: str, kind: str) -> dict[str, object]:
        out: dict[str, object] = {kind: name, "size": len(content), "blobId": sha1(content).hexdigest(), "oid": sha1(content).hexdigest()}
        if name.endswith(LARGE):
            digest = sha256(content).hexdigest()
            out["lfs"] = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 134}
        return out

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            if refusal is not None:
                return self._send(b"{}", {} if refusal[1] is None else {"X-Error-Code": refusal[1]}, status=refusal[0])
            path = self.path.partition("?")[0]
            for repository, files in repositories.items():
                name = path.removeprefix(f"/{repository}/resolve/{COMMIT}/")
                if path.startswith(f"/api/models/{repository}/tree/"):
                    return self._json([{"type": "file", **entry(content, n, "path")} for n, content in files.items()])
                if path.startswith(f"/api/models/{repository}"):
                    siblings = [entry(content, n, "rfilename") for n, content in files.items()]
                    return self._json({"id": repository, "sha": COMMIT, "siblings": siblings})
                if name in files:
                    if self.command == "GET":
                        hub.fetched.add(f"{repository}/{name}")
                    hash_ = sha256 if name.endswith(LARGE) else sha1
                    return self._send(files[name], {"ETag": f'"{hash_(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT})
            return self._send(b"{}", {"X-Error-Code": "EntryNotFound"}, status=404)

        def _json(self, value: object) -> None:
            self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

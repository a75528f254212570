"""A small stand-in for the Hugging Face hub: the few routes that a download of a whole model uses."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    models: Mapping[str, Mapping[str, bytes]]
    gated: frozenset[str] = frozenset()
    broken: bool = False
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0].strip("/")
            model = next((name for name in hub.models if path.removeprefix("api/models/").startswith(name)), None)
            if hub.broken:
                self.send(500, b"{}")
            elif model is None:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif model in hub.gated:
                self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif path.startswith("api/models/"):
                self.list_files(model, path)
            else:
                self.send_file(hub.models[model], path.rpartition("/")[2], body=body)

        def list_files(self, model: str, path: str) -> None:
            files = hub.models[model]
            if "/tree/" in path:
                entries = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                self.send(200, json.dumps(entries).encode())
                return
            info = {"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files], "private": False}
            self.send(200, json.dumps(info).encode())

        def send_file(self, files: Mapping[str, bytes], name: str, *, body: bool) -> None:
            if name not in files:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            tag = hashlib.sha256(files[name]).hexdigest()
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
            self.send(200, files[name], headers, body=body)

        def send(self, status: int, data: bytes, headers: Mapping[str, str] = {}, *, body: bool = True) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()

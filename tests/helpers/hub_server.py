"""A local stand-in of the Hugging Face hub: one data set, from a folder, over HTTP."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "them/cups"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the files of `folder` as the data set NAME, also in parts."""

    protocol_version = "HTTP/1.1"
    folder: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        self.requests.append(path)
        files = {str(file.relative_to(self.folder)): file for file in self.folder.rglob("*.*")}
        inside = path.rpartition(f"{SHA}/")[2]
        if "/resolve/" in path and inside in files:
            self._send_file(files[inside].read_bytes(), with_body)
        elif path.startswith((f"/api/datasets/{NAME}/tree/", f"/api/datasets/{NAME}/paths-info/")):
            self._send_json(list(_entries(files)), with_body)
        elif path in (f"/api/datasets/{NAME}", f"/api/datasets/{NAME}/revision/main") or (
            path == f"/api/datasets/{NAME}/revision/{SHA}"
        ):
            siblings = [{"rfilename": name} for name in sorted(files)]
            self._send_json({"id": NAME, "sha": SHA, "siblings": siblings}, with_body)
        else:
            known = path.startswith((f"/api/datasets/{NAME}", f"/datasets/{NAME}"))
            code = "EntryNotFound" if known else "RepoNotFound"
            self._send(404, {"X-Error-Code": code, "X-Repo-Commit": SHA}, b"", with_body)

    def _send_file(self, body: bytes, with_body: bool) -> None:
        head = {
            "X-Repo-Commit": SHA,
            "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if not wanted:
            self._send(200, head, body, with_body)
            return
        first, _, last = wanted.partition("-")
        end = min(len(body), int(last) + 1) if last else len(body)
        head["Content-Range"] = f"bytes {first}-{end - 1}/{len(body)}"
        self._send(206, head, body[int(first) : end], with_body)

    def _send_json(self, content: object, with_body: bool) -> None:
        self._send(200, {"X-Repo-Commit": SHA}, json.dumps(content).encode(), with_body)

    def _send(self, status: int, head: dict[str, str], body: bytes, with_body: bool) -> None:
        self.send_response(status)
        for key, value in {**head, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def run_script(
    script: str, address: str, home: Path, *arguments: str, offline: bool = False
) -> Any:
    """What a Python script prints last, as JSON, in a process of its own: the libraries of the hub
    read their environment when they are imported."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home)}
    environment["HF_HUB_OFFLINE"] = str(int(offline))
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _entries(files: dict[str, Path]) -> Iterator[dict[str, object]]:
    folders = {str(Path(name).parent) for name in files} - {"."}
    for name in sorted(folders):
        yield {"type": "directory", "path": name, "oid": SHA}
    for name, file in sorted(files.items()):
        yield {"type": "file", "path": name, "size": file.stat().st_size, "oid": SHA}


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(its address, the requests so far)."""
    handler = type("Handler", (Hub,), {"folder": folder, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.requests
    finally:
        server.shutdown()
        server.server_close()

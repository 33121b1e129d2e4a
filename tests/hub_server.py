"""A hub of folders on 127.0.0.1, with the faults that a network has."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


class Hub:
    """Repositories by name, each a folder, under one commit that "main" and "v1" point to.

    Attributes:
        repos: name to folder.
        private: names that want `TOKEN`.
        gated: likewise, whose terms must be accepted.
        hidden: files "name" that are listed and not there.
        cut: file to how many more times its connection breaks half way.
        spoiled: file to what stands in the place of its last bytes.
        asked: how often each "METHOD path" was asked for.
        sent: bytes that were sent of each file.
        is_ill: whether every answer is an error of the server.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.private, self.gated, self.hidden = set(), set(), set()
        self.cut: Counter[str] = Counter()
        self.spoiled: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.is_ill = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"  # a connection per request: closed is closed

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, has_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, has_body=False)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        """From here on nobody answers."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, has_body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked[f"{request.command} {path}"] += 1
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if self.is_ill:
            return self._refuse(request, 500, "")
        if found is None:
            return self._refuse(request, 404, "")
        name, revision = found[1], found[2] or "main"
        has_token = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name in self.private | self.gated and not has_token:
            code = "GatedRepo" if name in self.gated else "RepoNotFound"
            return self._refuse(request, 403 if name in self.gated else 401, code)
        if name not in self.repos:
            return self._refuse(request, 404, "RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self._refuse(request, 404, "RevisionNotFound")
        if api:
            return self._send(request, 200, json.dumps(self._info(name)).encode(), has_body)
        target = self.repos[name] / found[3]
        if found[3] in self.hidden or not target.is_file():
            return self._refuse(request, 404, "EntryNotFound")
        return self._send_file(request, found[3], target, has_body)

    def _info(self, name: str) -> dict[str, Any]:
        folder, siblings = self.repos[name], []
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            data = path.read_bytes()
            entry: dict[str, Any] = {
                "rfilename": path.relative_to(folder).as_posix(),
                "size": len(data),
                "blobId": hashlib.sha1(data).hexdigest(),
            }
            if path.suffix == ".safetensors":
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False}

    def _send_file(
        self, request: BaseHTTPRequestHandler, name: str, path: Path, has_body: bool
    ) -> None:
        data = path.read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        tail = self.spoiled.get(name, b"")
        data = data[: len(data) - len(tail)] + tail
        first = int((request.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        part = data[first:]
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        is_cut = has_body and self.cut[name] > 0
        body = part[: len(part) // 2] if is_cut else part
        if has_body:
            self.sent[name] += len(body)
        status = 206 if first else 200
        self._send(request, status, body, has_body, len(part), **headers)
        if is_cut:
            self.cut[name] -= 1
            request.close_connection = True

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self._send(request, status, b"{}", request.command == "GET", None, **headers)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        has_body: bool,
        length: int | None = None,
        **headers: str,
    ) -> None:
        with contextlib.suppress(ConnectionError):
            request.send_response(status)
            for name, value in headers.items():
                request.send_header(name, value)
            request.send_header("Content-Length", str(len(body) if length is None else length))
            request.end_headers()
            if has_body:
                request.wfile.write(body)
                request.wfile.flush()

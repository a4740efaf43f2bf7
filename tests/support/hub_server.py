"""A server that speaks as much of the hub's API as its client asks for, over a directory of models."""

import hashlib
import json
import re
from typing import Any
from urllib.parse import unquote, urlsplit

from range_server import PEEK, Handler, RangeServer, Request

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


class HubHandler(Handler):
    """Answers for ``owner/name`` below the root; tensors are led on to another host, as from the hub to its storage."""

    def answer(self, body: bool) -> None:
        state: RangeServer = self.server.state
        path = unquote(urlsplit(self.path).path).lstrip("/")
        if found := re.fullmatch(r"api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self.info(state, found[1], found[2])
        if found := re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(state, found[1], found[3], body)
        if path.startswith("storage/"):
            self.path = path.removeprefix("storage/")
            return super().answer(body)
        return self.plain(404)

    def note(self, state: RangeServer, path: str) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        state.requests.append(Request(path, self.headers.get("Range", ""), headers))

    def info(self, state: RangeServer, repo: str, revision: str | None) -> None:
        self.note(state, f"info {repo}")
        root = state.root / repo
        if state.fault(f"info {repo}", 0) == "401":
            return self.plain(
                401, {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        if not root.is_dir():
            return self.plain(
                401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
        if revision not in (None, "main", "v1", COMMIT):
            return self.plain(
                404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Revision not found"}
            )
        sizes = {
            str(p.relative_to(root)): p.stat().st_size
            for p in sorted(root.rglob("*"))
            if p.is_file()
        }
        return self.json(
            {
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": name, "size": size} for name, size in sizes.items()],
            }
        )

    def json(self, tree: Any) -> None:
        data = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def resolve(self, state: RangeServer, repo: str, name: str, body: bool) -> None:
        resolved = f"resolve {repo}/{name}"
        asked = self.headers.get("Range", "")
        before = sum(
            r.path == resolved and (r.range == PEEK) == (asked == PEEK) for r in state.requests
        )
        self.note(state, resolved)
        fault = (state.peek_fault if asked == PEEK else state.fault)(resolved, before)
        if fault in ("401", "403", "429", "500"):
            return self.plain(
                int(fault), {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
        path = state.root / repo / name
        if not path.is_file():
            return self.plain(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = path.read_bytes()
        commit = {"X-Repo-Commit": COMMIT}
        if name.endswith(".safetensors"):
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            port = self.server.server_port
            headers = {"X-Linked-Etag": tag, "X-Linked-Size": str(len(data)), "ETag": tag}
            return self.plain(
                302,
                {
                    **commit,
                    **headers,
                    "Location": f"http://localhost:{port}/storage/{repo}/{name}?X-Signature=secret",
                },
            )
        self.send_response(200)
        for key, value in {
            **commit,
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "Content-Length": str(len(data)),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)
        return None

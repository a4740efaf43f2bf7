"""A server of files by ranges, in threads of this process: it counts bytes, keeps to a rate, and fails as it is told."""

import contextlib
import gzip
import hashlib
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PEEK = "bytes=0-0"
LED = "led/"

FAULTS = ("stall", "reset", "429", "500", "short", "whole", "401", "403", "changed")


@dataclass
class Request:
    """A request that was answered: its path, range, and the bytes of data that were sent."""

    path: str
    range: str
    headers: dict[str, str]
    sent: int = 0


@dataclass
class RangeServer:
    """What is served, and what came of it.

    Attributes
    ----------
    root
        Directory that is served.
    fault
        Told a path and how many requests for data of it came before; names one of `FAULTS`, or gives None.
    peek_fault
        The same of requests for the first byte, which ask for size and version.
    rate
        Bytes per second over all connections; None for no limit.
    tags
        ETags by path, where they are not of the content.
    redirect
        Address of a server that requests are led on to, below `LED`; empty for none.
    retry_after
        Seconds that a 429 asks to wait.
    page
        Content type and bytes that are given, with a status of 200, for what is absent; None for a 404.
    encoded
        Told a path and a range; says whether the answer is compressed, though it was asked for as it is.
    """

    root: Path
    fault: Callable[[str, int], str | None] = lambda path, n: None
    peek_fault: Callable[[str, int], str | None] = lambda path, n: None
    rate: float | None = None
    tags: dict[str, str] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    address: str = ""
    redirect: str = ""
    retry_after: float = 0
    stall: float = 300.0
    page: tuple[str, bytes] | None = None
    encoded: Callable[[str, str], bool] = lambda path, part: False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free: float = 0.0
    _known: dict[tuple[Path, int, int], str] = field(default_factory=dict)

    @property
    def sent(self) -> int:
        """Bytes of data sent."""
        return sum(request.sent for request in self.requests)

    def reset(self) -> None:
        """Forget what was served."""
        self.requests = []

    def wait(self, nbytes: int) -> None:
        """Wait as the rate asks."""
        if self.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free = max(self._free, now - 0.02) + nbytes / self.rate
            until = self._free
        time.sleep(max(0.0, until - now))

    def tag(self, path: Path, name: str) -> str:
        """The ETag of a file."""
        if name in self.tags:
            return self.tags[name]
        st = path.stat()
        key = (path, st.st_size, st.st_mtime_ns)
        if key not in self._known:
            whole = (
                hashlib.sha256(path.read_bytes()).hexdigest() if st.st_size < 1 << 24 else repr(key)
            )
            self._known[key] = f'"{hashlib.sha256(whole.encode()).hexdigest()[:32]}"'
        return self._known[key]


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD with whole files and single ranges."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body waits 40 ms for the headers to be acknowledged
    server: Any

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        state: RangeServer = self.server.state
        name = unquote(urlsplit(self.path).path).lstrip("/")
        asked = self.headers.get("Range", "")
        with state._lock:
            before = sum(
                r.path == name and (r.range == PEEK) == (asked == PEEK) for r in state.requests
            )
            request = Request(
                name, asked, {key.lower(): value for key, value in self.headers.items()}
            )
            state.requests.append(request)
        if state.redirect and not name.startswith(LED):
            return self.plain(302, {"Location": f"{state.redirect}/{LED}{name}"})
        name = name.removeprefix(LED)
        path = state.root / name
        if not path.is_file():
            page = (
                state.page
                if state.page is None or name.endswith(".json") or "json" not in state.page[0]
                else None
            )
            return self.plain(404) if page is None else self.give_page(*page)
        fault = (state.peek_fault if asked == PEEK else state.fault)(name, before)
        if fault in ("401", "403", "500"):
            return self.plain(int(fault))
        if fault == "429":
            return self.plain(429, {"Retry-After": f"{state.retry_after:g}"})
        size = path.stat().st_size
        tag = state.tag(path, name)
        if fault == "changed":
            state.tags[name] = tag = '"another"'
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        start, stop = (int(found[1]), min(size, int(found[2]) + 1)) if found else (0, size)
        partial = found is not None and fault != "whole"
        if not partial:
            start = 0
            stop = size
        if partial and start >= size:
            return self.plain(416, {"Content-Range": f"bytes */{size}"})
        if state.encoded(name, asked):
            with path.open("rb") as f:
                f.seek(start)
                body_bytes = gzip.compress(f.read(stop - start))
            self.send_response(206 if partial else 200)
            self.send_header("ETag", tag)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.send_header("Content-Length", str(len(body_bytes)))
            self.end_headers()
            self.wfile.write(body_bytes)
            return None
        self.send_response(206 if partial else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if not body:
            return None
        cut = start + (stop - start) // 2 if fault in ("short", "stall", "reset") else stop
        with path.open("rb") as f:
            f.seek(start)
            while start < cut:
                piece = f.read(min(1 << 18, cut - start))
                state.wait(len(piece))
                # First: on a busy machine the client has the bytes, and the test asks, before this thread goes on.
                request.sent += len(piece)
                try:
                    self.wfile.write(piece)
                except OSError:
                    request.sent -= len(piece)
                    self.close_connection = True
                    return None
                start += len(piece)
        if fault == "stall":
            self.wfile.flush()
            select.select([self.connection], [], [], state.stall)  # until the client has given up
        if fault == "reset":
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("short", "stall", "reset"):
            self.close_connection = True
        return None

    def give_page(self, kind: str, data: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", '"page"')
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def plain(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """Say nothing of clients that have gone."""


@contextlib.contextmanager
def serving(root: Path, handler: type[Handler] = Handler, **options: Any) -> Iterator[RangeServer]:
    """Serve a directory on a free port of this machine."""
    server = _Server(("127.0.0.1", 0), handler)
    state = RangeServer(root, **options)
    server.state = state  # type: ignore[attr-defined]
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

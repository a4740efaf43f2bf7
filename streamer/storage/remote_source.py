"""Read files at URLs by ranges, by HTTP or from buckets: several at a time, with retries, and always of one version.

fsspec's own HTTP decodes, follows redirects, reads a whole file into memory if the server ignores the range, and returns the bytes without
status and headers, so that nothing could be checked. `read_range` retries, and compares versions.

A manifest names the remote files for which a directory stands. It counts only inside this user's cache: a directory from elsewhere could
contain one that names any URL.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import ssl
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote

from streamer import __version__
from streamer.errors import (
    InputChangedError,
    InputError,
    MissingPackageError,
    StorageError,
    UnsupportedError,
)
from streamer.events import Monitor
from streamer.packages import require_package
from streamer.storage.files import Stamp, storage_errors
from streamer.storage.header import Header, read_header_by
from streamer.storage.local_source import IOMode
from streamer.units import format_size

PLUGINS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
"""The plugin of fsspec for each scheme of buckets."""

VERSIONS = ("ETag", "etag", "generation", "LastModified", "last_modified", "updated", "mtime")
"""Keys by which file systems state a file's version, in order of preference."""

CONNECTIONS = 16
"""Number of connections kept to one server."""

REDIRECTS = 8
REQUESTED_BYTES = 1 << 20

DRAINED_BYTES = 1 << 10
"""Most bytes of an unwanted answer that are read: less work than another connection."""

TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
ABSENT = {404, 410}
REFUSED = {401, 403, 407}
CONNECT_SECONDS = 10.0

_ranged: set[str] = set()
"""Servers that have answered with ranges."""


class Transient(Exception):
    """A transient failure.

    Attributes
    ----------
    done
        Bytes received before it.
    wait
        Seconds that the server asks to wait; None if it does not.
    """

    def __init__(self, reason: str, done: int = 0, wait: float | None = None) -> None:
        super().__init__(reason)
        self.done = done
        self.wait = wait


@dataclass(frozen=True)
class RemoteFile:
    """One version of a file at a URL.

    Attributes
    ----------
    url
        URL for reading; it may contain a signature and is never shown.
    shown
        The URL without secrets, for messages.
    size
        Size in bytes.
    version
        Its ETag, generation or modification time, depending on the server.
    token
        Whether it is of a commit on the hub: requests include the hub's token, and its version cannot change.
    ranges
        Whether its server supports ranges.
    """

    url: str
    shown: str
    size: int
    version: str
    token: bool = False
    ranges: bool = True

    @property
    def stamp(self) -> Stamp:
        """Return a stamp in the form of a local file's, made from URL and version."""
        digest = hashlib.sha256(f"{self.shown}\n{self.version}".encode()).digest()
        return 0, 0, self.size, int.from_bytes(digest[:7], "little")

    def check(self, version: str, size: int | None) -> None:
        """Raise `InputChangedError` if this is not the version stated now; an empty one and a size of None are not compared."""
        if (version not in ("", self.version) and not self.token) or size not in (None, self.size):
            raise InputChangedError.changed(self.shown)


def request_stat(url: str, shown: str, token: bool = False) -> RemoteFile | None:
    """Request a file's size and version; None if there is no such file, or a web page instead.

    Raises
    ------
    Transient, InputError, StorageError
        If the answer is not available now, access is refused, or the server states no version.
    """
    if not url.startswith("http"):
        try:
            with _bucket(url, shown) as (fs, path):
                fs.invalidate_cache()
                info = fs.info(path)
        except (FileNotFoundError, IsADirectoryError):
            return None
        return None if info.get("type") == "directory" else _stated(url, shown, info)
    # The first byte: URLs that are signed for reading allow this but not HEAD.
    with _answer(url, "bytes=0-0", shown, token) as (response, status, version):
        if status in ABSENT:
            return None
        if status in REFUSED:
            raise _refused(shown, status, token)
        return _stated(
            url, shown, {"size": _total(response), "ETag": version}, token, status != 200
        )


def request_range(file: RemoteFile, out: memoryview, at: int) -> None:
    """Read from offset `at` into `out`.

    Raises
    ------
    Transient, InputError, StorageError, InputChangedError
        If not all bytes came, reading failed permanently, access is refused, or the file has changed.
    """
    if not file.url.startswith("http"):
        try:
            with _bucket(file.url, file.shown) as (fs, path):
                data = fs.cat_file(path, start=at, end=at + len(out))
        except (FileNotFoundError, IsADirectoryError) as e:
            raise InputChangedError.vanished(file.shown) from e
        if len(data) != len(out):
            raise Transient(f"the server gives {format_size(len(data))} of {format_size(len(out))}")
        out[:] = data
        return
    with _answer(file.url, f"bytes={at}-{at + len(out) - 1}", file.shown, file.token) as (
        response,
        status,
        version,
    ):
        if status in REFUSED:
            raise _refused(file.shown, status, file.token)
        if status in ABSENT | {416}:
            raise InputChangedError(
                f"{file.shown}: vanished or shrank during the run; put it back and start again"
            )
        file.check(version, _total(response))
        server = _urllib3().util.parse_url(file.url).netloc
        if status == 206:
            _ranged.add(server)
            if not response.headers.get("Content-Range", "").startswith(f"bytes {at}-"):
                raise Transient("the server answers with another range")
        elif at != 0 or len(out) != file.size:
            if server not in _ranged:
                raise no_ranges(file.shown)
            raise Transient("the server gives the whole file in place of a range")
        done = 0
        try:
            while done < len(out) and (
                piece := response.read(min(REQUESTED_BYTES, len(out) - done), decode_content=False)
            ):
                out[done : done + len(piece)] = piece
                done += len(piece)
        except (_urllib3().exceptions.HTTPError, OSError) as e:
            raise Transient(_reason(e), done) from e
        if done < len(out):
            raise Transient(
                f"the answer ended after {format_size(done)} of {format_size(len(out))}", done
            )


def request_list(url: str, shown: str) -> dict[str, RemoteFile]:
    """List the files below a URL of a bucket, by their relative names.

    Raises
    ------
    Transient, InputError, StorageError
        If the list is not available now, access is refused, or the server states no versions.
    """
    try:
        with _bucket(url, shown) as (fs, path):
            fs.invalidate_cache()
            entries = fs.find(path, detail=True)
    except (FileNotFoundError, IsADirectoryError):
        return {}
    scheme = url.partition("://")[0]
    start = path.rstrip("/") + "/"
    inside = {full: f"{scheme}://{full}" for full in entries if full.startswith(start)}
    return {full.removeprefix(start): _stated(at, at, entries[full]) for full, at in inside.items()}


def no_ranges(shown: str) -> UnsupportedError:
    """Make the error for a server that supports no ranges."""
    return UnsupportedError(
        f"{shown}: expected a part of the file, its server gives whole files only; download it and name the directory"
    )


def without_secrets(text: str) -> str:
    """Remove queries, users and passwords from URLs in a text."""
    return re.sub(r"(://)[^/\s@]*@", r"\1", re.sub(r"\?[^\s'\")]*", "", text))


def _refused(shown: str, status: int, token: bool) -> InputError:
    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
    advice = login if token else "check its user, password or signature, which may have expired"
    return InputError(f"{shown}: the server refuses to give it (status {status}); {advice}")


def _urllib3() -> Any:
    return require_package("urllib3", (2,), "reading from addresses needs urllib3 2", "remote")


@contextmanager
def _answer(url: str, part: str, shown: str, token: bool) -> Iterator[tuple[Any, int, str]]:
    """Request a range and follow redirects; yield the answer, its status (404 for a page), and the version that it states.

    Raises
    ------
    Transient, StorageError, UnsupportedError
        If the status is not one that a file or its absence has, or the answer is compressed.
    """
    urllib3 = _urllib3()
    headers = {
        "Range": part,
        "Accept-Encoding": "identity",
        "User-Agent": f"streamer/{__version__}",
    }
    timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=_silence_allowed())
    retries = urllib3.Retry(None, connect=False, read=False, other=0, redirect=REDIRECTS)
    try:
        bare = urllib3.util.parse_url(url)._replace(auth=None)
        bypassed = urllib.request.proxy_bypass((bare.host or "").strip("[]"))
        proxy = "" if bypassed else urllib.request.getproxies().get(bare.scheme, "")
        headers |= _authorization(url, token)  # which redirects to other hosts do not get
        response = _pool(proxy).request(
            "GET",
            bare.url,
            headers=headers,
            preload_content=False,
            retries=retries,
            timeout=timeout,
        )
    except (
        urllib3.exceptions.MaxRetryError
    ) as e:  # its certificate does not hold, or it redirects without end
        raise StorageError(
            f"{shown}: cannot read: {_reason(e.reason or e)}; check the address"
        ) from e
    except ValueError as e:  # urllib3's own among them
        raise StorageError(f"{shown}: is no address that can be asked; check it") from e
    except urllib3.exceptions.HTTPError as e:
        raise Transient(_reason(e)) from e
    try:
        status = response.status
        if response.headers.get("Content-Type", "").lower().startswith("text/html") and status in (
            200,
            206,
        ):
            status = 404  # a page instead of a file: many servers send one for a missing file
        if status in TRANSIENT:
            asked = None
            with suppress(urllib3.exceptions.InvalidHeader):
                asked = urllib3.Retry().get_retry_after(response)
            raise Transient(f"status {status}", wait=asked)
        if status not in {200, 206, 416} | ABSENT | REFUSED:
            raise StorageError(
                f"{shown}: cannot read: the server answers with status {status}; check the address"
            )
        if status in (200, 206):
            encoding = response.headers.get("Content-Encoding", "").strip().lower()
            if encoding not in (
                "",
                "identity",
            ):  # although the request excluded it; its bytes are not the file's
                sent = f"the server sent this file compressed ({encoding[:40]}), expected it uncompressed"
                raise UnsupportedError(f"{shown}: {sent}; download it and name the directory")
        yield (
            response,
            status,
            response.headers.get("ETag") or response.headers.get("Last-Modified") or "",
        )
    finally:
        _finish(response)


@cache
def _pool(proxy: str) -> Any:
    urllib3 = _urllib3()
    context = ssl.create_default_context()
    options = {"maxsize": CONNECTIONS, "num_pools": CONNECTIONS, "ssl_context": context}
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)


def _authorization(url: str, token: bool) -> dict[str, str]:
    if token:
        secret = import_module("huggingface_hub").get_token()
        return {"Authorization": f"Bearer {secret}"} if secret else {}
    util = _urllib3().util
    if (user := util.parse_url(url).auth) is None:
        return {}
    return dict(util.make_headers(basic_auth=unquote(user if ":" in user else f"{user}:")))


def _total(response: Any) -> int | None:
    """Read the size of the whole file from the answer to a range request; None if not stated."""
    if match := re.fullmatch(
        r"bytes (?:\d+-\d+|\*)/(\d+)", response.headers.get("Content-Range", "")
    ):
        return int(match[1])
    length = response.headers.get("Content-Length", "")
    return int(length) if response.status == 200 and length.isdecimal() else None


def _silence_allowed() -> float:
    """Return the seconds without a byte after which a server counts as stalled."""
    try:
        return max(0.1, float(os.environ.get("STREAMER_REMOTE_TIMEOUT", "20")))
    except ValueError:
        return 20.0


def _reason(e: Exception) -> str:
    """Describe a connection error briefly."""
    kinds = {
        "ReadTimeoutError": f"no byte came for {_silence_allowed():g} s",
        "ConnectTimeoutError": "nothing answers",
        "NewConnectionError": "nothing answers",
        "NameResolutionError": "its name leads to no server",
        "IncompleteRead": "the answer ended early",
    }
    while type(e).__name__ not in kinds and (
        inner := [arg for arg in e.args if isinstance(arg, Exception)]
    ):
        e = inner[0]
    name = type(e).__name__
    return kinds.get(name) or without_secrets(getattr(e, "strerror", None) or str(e) or name)


def _finish(response: Any) -> None:
    """Return a connection for reuse, which needs its answer read to the end; close it if much is left."""
    if response.length_remaining is not None and response.length_remaining <= DRAINED_BYTES:
        response.drain_conn()
        response.release_conn()
    else:
        response.close()


@contextmanager
def _bucket(url: str, shown: str) -> Iterator[tuple[Any, str]]:
    """Open the file system of a URL; convert exceptions of its plugin, except for an absent file's, to ours."""
    fsspec = require_package("fsspec", (2023,), "reading from buckets needs fsspec 2023", "remote")
    try:
        yield fsspec.core.url_to_fs(url)
    except (FileNotFoundError, IsADirectoryError):
        raise
    except ImportError:
        plugin = PLUGINS[url.partition("://")[0]]
        lacks = f"such an address needs {plugin}, which is not installed; pip install 'intruder-streamer[remote]'"
        raise MissingPackageError(f"{shown}: {lacks}", plugin) from None
    except Exception as e:  # each plugin has its own exceptions
        name = type(e).__name__
        text = without_secrets(str(e))
        if (
            isinstance(e, PermissionError)
            or "Credential" in name
            or "AuthenticationRequired" in name
        ):
            raise InputError(
                f"{shown}: may not be read ({name}); set credentials as for its own client"
            ) from e
        if isinstance(e, NotImplementedError | TypeError | AttributeError):
            raise StorageError(
                f"{shown}: cannot read: {name}: {text}; update the plugin of fsspec"
            ) from e
        raise Transient(f"{name}: {text[:120]}" if text else name) from e


def _stated(
    url: str, shown: str, info: dict[str, Any], token: bool = False, ranges: bool = True
) -> RemoteFile:
    """Return the file that a server describes."""
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    if info.get("size") is None or not version:
        lacks = "its server does not state size and version (ETag or time of change), so a change could not be seen"
        raise StorageError(f"{shown}: {lacks}; download it and name the directory")
    return RemoteFile(url, shown, int(info["size"]), version, token, ranges)


IN_FLIGHT = 8
"""Most requests at a time, over all files."""

RANGE_BYTES = 8 << 20
"""Most bytes of a range."""

LEAST_BYTES = 1 << 20
"""Least bytes of a range when a tensor is divided: a request needs about as long as this many bytes."""

AHEAD_BYTES = 6 * RANGE_BYTES
"""Bytes that are requested or read ahead of a sequential reader."""

TRIES = 6
"""Attempts at a range without progress; the first wait is half a second, each further one twice as long: 15 s in total."""

FIRST_TRIES = 4
"""Attempts at a file's first request, since the URL may have no server: 3.5 s in total."""

LONGEST_WAIT = 120.0
"""Longest wait in seconds that a server may request by ``Retry-After``; if it requests more, reading fails."""

PROGRESS_BYTES = 1 << 16
"""Bytes of a range after which its attempts are counted from zero again."""

POLLED = 0.1
"""Seconds between checks for a request to stop during a wait."""

MANIFEST_NAME = ".streamer.remote.json"

T = TypeVar("T")

_threads = ThreadPoolExecutor(
    IN_FLIGHT, thread_name_prefix="streamer range"
)  # begun as they are needed

_monitor = ContextVar("monitor", default=Monitor())  # noqa: B039  # one that nobody asks to stop


@dataclass(frozen=True)
class Manifest:
    """The remote content that a directory represents.

    Attributes
    ----------
    address
        The URL as the user gave it, without secrets.
    files
        Files that are read by ranges, by name; the file of that name in the directory is only a note for people.
    to_download
        Bytes that a run would download first, if only a forecast was requested.
    """

    address: str
    files: Mapping[str, RemoteFile]
    to_download: int = 0

    def write(self, directory: Path) -> None:
        """Write the manifest, readable only by this user: URLs may contain signatures."""
        new = directory / f"{MANIFEST_NAME}.{token_hex(8)}"
        with storage_errors(new, "write"):
            with open(new, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as f:
                f.write(json.dumps(asdict(self)).encode())
            new.replace(directory / MANIFEST_NAME)


def cache_directory() -> Path:
    """Return this user's cache: ``$XDG_CACHE_HOME/streamer``, by default ``~/.cache/streamer``."""
    stated = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(stated) if os.path.isabs(stated) else Path.home() / ".cache") / "streamer"


def read_manifest(directory: Path) -> Manifest | None:
    """Read a directory's manifest; None if it has none, or none of ours."""
    try:
        if not Path(os.path.realpath(directory)).is_relative_to(
            os.path.realpath(cache_directory())
        ):
            return None
        tree = json.loads((directory / MANIFEST_NAME).read_bytes())
        files = {name: RemoteFile(**entry) for name, entry in tree["files"].items()}
        return Manifest(tree["address"], files, tree["to_download"])
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
    ):  # no manifest, no home directory, or torn
        return None


def heed(monitor: Monitor) -> None:
    """Make waits for servers in this context end if this monitor receives a request to stop."""
    _monitor.set(monitor)


def at_once(call: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> list[T]:
    """Call a function with each of several arguments concurrently; raise the first error, and cancel calls that have not begun."""
    futures = [_submitted(call, *each) for each in arguments]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)  # so that none writes to a buffer after its owner has left


def stat_remote(url: str, shown: str, token: bool = False) -> RemoteFile | None:
    """Request a file's size and version, retrying transient failures; None if there is no such file.

    Raises
    ------
    InputError, StorageError
        If access is refused, or no server answers.
    """
    return _retried(shown, FIRST_TRIES, lambda: request_stat(url, shown, token))


def list_remote(url: str, shown: str) -> dict[str, RemoteFile]:
    """List the files below a URL of a bucket, by their relative names, in the same way."""
    return _retried(shown, FIRST_TRIES, lambda: request_list(url, shown))


def read_range(file: RemoteFile, out: memoryview, at: int) -> None:
    """Read bytes from offset `at` until `out` is full, continuing after transient failures.

    Raises
    ------
    StorageError
        If no byte arrives in `TRIES` attempts, or the server refuses.
    InputChangedError
        If the file has changed.
    """
    done = 0

    def read_rest() -> None:
        nonlocal done
        try:
            request_range(file, out[done:], at + done)
        except Transient as e:
            done += e.done
            raise
        except UnsupportedError:
            raise
        except InputError as e:  # access was allowed when the run began
            raise StorageError(f"{e}; then run the same command again") from e

    if len(out):
        _retried(file.shown, TRIES, read_rest)


def _retried(shown: str, most: int, call: Callable[[], T]) -> T:
    """Call until there is no transient failure.

    Raises
    ------
    StorageError
        If there were enough attempts without progress, or the server requests too long a wait.
    Interrupted
        If a stop is requested meanwhile.
    """
    tries = received = 0
    while True:
        try:
            return call()
        except Transient as e:
            received += e.done
            if received >= PROGRESS_BYTES:
                tries = 1
                received = 0
            else:
                tries += 1
            long = e.wait is not None and e.wait > LONGEST_WAIT
            if tries >= most or long:
                again = f" in {tries} attempts" if tries > 1 else ""
                asked = f" (the server asks to wait {e.wait:.0f} s)" if long else ""
                raise StorageError(
                    f"{shown}: cannot read{again}: {e}{asked}; run the same command again"
                ) from e
            backoff = 0.5 * 2 ** (tries - 1) * random.uniform(0.75, 1.0)  # noqa: S311  # so that several readers do not retry at once
            _sleep(backoff if e.wait is None else max(e.wait, 0.05))


def _sleep(seconds: float) -> None:
    """Sleep, or raise `Interrupted` as soon as a stop is requested."""
    monitor = _monitor.get()
    until = time.monotonic() + seconds
    while True:
        monitor.checkpoint()
        if (left := until - time.monotonic()) <= 0:
            return
        time.sleep(min(left, POLLED))


def _submitted(call: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function in another thread, with the monitor of this context."""
    return _threads.submit(copy_context().run, call, *arguments)


class _Range(NamedTuple):
    start: int
    stop: int
    data: memoryview
    future: Future[None]


class RemoteSource:
    """Ranges of one version of a file; see `read_range`. The methods are those of `LocalSource`."""

    remote = True

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self.stamp = file.stamp
        self.io: IOMode = "pread"
        self._ahead: deque[_Range] = deque()
        self._lock = threading.Lock()

    def header(self) -> Header:
        """Read the header by two small ranges and validate it."""
        size = self.file.size
        return read_header_by(
            lambda at, n: bytes(self.view(at, min(n, size - at))), size, self.file.shown
        )

    def view(self, at: int, length: int) -> memoryview:
        """Read bytes into a new buffer."""
        out = memoryview(bytearray(length))
        self.read_into(out, at)
        return out

    def read_pieces(self, pieces: Iterable[tuple[memoryview, int]]) -> None:
        """Read all pieces at once."""
        at_once(read_range, [(self.file, out, at) for out, at in pieces if len(out)])

    def read_into(self, out: memoryview, at: int) -> None:
        """Return bytes that were read ahead, and read the rest."""
        if not self._ahead:  # several threads may read at once
            self._read_ranges(out, at)
            return
        with self._lock:
            while len(out):
                self._forget_before(at)
                if not self._ahead or self._ahead[0].start > at:
                    self._read_ranges(out, at)
                    return
                first = self._ahead[0]
                first.future.result()
                piece = first.data[at - first.start :][: len(out)]
                out[: len(piece)] = piece
                out = out[len(piece) :]
                at += len(piece)

    def prefetch(self, start: int, stop: int, end: int) -> None:
        """Request what follows `start`, up to `AHEAD_BYTES` and before `end`."""
        with self._lock:
            ahead = self._ahead
            self._forget_before(start)
            if ahead and not ahead[0].start <= start:  # the reader is elsewhere in the file
                self.close()
            following = ahead[-1].stop if ahead else start
            while following < min(end, max(stop, start + AHEAD_BYTES)):
                data = memoryview(bytearray(min(RANGE_BYTES, end - following)))
                reading = _submitted(read_range, self.file, data, following)
                ahead.append(_Range(following, following := following + len(data), data, reading))

    def release(self, start: int, stop: int) -> None:
        """Do nothing: bytes from a server are in no cache."""

    def check_unchanged(self) -> None:
        """Request size and version again."""
        try:
            now = stat_remote(self.file.url, self.file.shown, self.file.token)
        except InputError as e:
            raise StorageError(f"{e}; then run the same command again") from e
        if now is None:
            raise InputChangedError.vanished(self.file.shown)
        self.file.check(now.version, now.size)

    def close(self) -> None:
        """Cancel requests that have not begun."""
        while self._ahead:
            self._ahead.pop().future.cancel()

    def _forget_before(self, at: int) -> None:
        while self._ahead and self._ahead[0].stop <= at:
            self._ahead.popleft()

    def _read_ranges(self, out: memoryview, at: int) -> None:
        """Read bytes by as many ranges as may be requested at a time, unless they would be too small."""
        step = min(RANGE_BYTES, max(LEAST_BYTES, -(-len(out) // IN_FLIGHT)))
        self.read_pieces((out[i : i + step], at + i) for i in range(0, len(out), step))

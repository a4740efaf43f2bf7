"""Read files at https URLs and on the hub: the status, offset and ETag of each range are checked before use."""

from __future__ import annotations

import re
import ssl
import threading
import time
import urllib.request
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, NoReturn
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from streamer import __version__
from streamer.errors import InputChangedError, StorageError, UnsupportedError
from streamer.packages import require_package
from streamer.storage.remote_access import (
    Access,
    RemoteStat,
    Transient,
    check_version,
    no_ranges,
    refused,
    silence_allowed,
    without_secrets,
)
from streamer.storage.remote_manifest import RemoteFile

CONNECTIONS = 16
"""Number of connections kept to one server."""

REDIRECTS = 8
PIECE_BYTES = 1 << 20

DRAINED_BYTES = 1 << 10
"""Most bytes of an unwanted answer that are read: less work than another connection."""

TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
ABSENT = {404, 410}
REFUSED = {401, 403, 407}
CONNECT_SECONDS = 10.0


class HttpAccess(Access):
    """Ranges by HTTP; if a URL redirects, as the hub's do, the target is used until it refuses."""

    def __init__(self) -> None:
        self._urllib3 = _urllib3()
        self._lock = threading.Lock()
        self._located: dict[str, str] = {}
        self._ranged: set[str] = set()

    def stat(self, url: str, shown: str, *, token: bool = False) -> RemoteStat | None:
        """Request the first byte: URLs that are signed for reading allow this but not HEAD."""
        response, version = self._get(url, url, "bytes=0-0", shown, token=token)
        try:
            status, total = response.status, _total(response)
            if status in ABSENT:
                return None
            if status in REFUSED:
                raise refused(shown, status, token=token)
            if status not in (200, 206, 416):
                _fail(response, shown)
            if response.headers.get("Content-Type", "").lower().startswith("text/html"):
                return None  # a page instead of a file: many servers send one for a missing file
            _refuse_encoded(response, shown)
            if total is None or not version:
                raise StorageError(
                    f"{shown}: its server does not state size and ETag or time of change, so that a change could not be seen; download it "
                    "and name the directory"
                )
            return RemoteStat(total, version, status != 200)
        finally:
            _done(response)

    def fetch(self, file: RemoteFile, out: memoryview, at: int) -> int:
        """Request a range and read the answer."""
        url = self._located.get(file.url, file.url)
        response, version = self._get(url, file.url, f"bytes={at}-{at + len(out) - 1}", file.shown, token=file.token)
        try:
            status = response.status
            if status in ABSENT | REFUSED and url != file.url:  # the redirect's target has expired
                with self._lock:
                    self._located.pop(file.url, None)
                raise Transient(f"status {status}", wait=0)
            if status in REFUSED:
                raise StorageError(f"{refused(file.shown, status, token=file.token)}; then run the same command again")
            if status in ABSENT | {416}:
                raise InputChangedError(f"{file.shown}: vanished or shrank during the run; put it back and start again")
            if status not in (200, 206):
                _fail(response, file.shown)
            _refuse_encoded(response, file.shown)
            # A redirect's target states the version in another form.
            check_version(file, version if url == file.url else "", _total(response))
            if status == 206:
                self._ranged.add(urlsplit(url).netloc)
                if not re.match(rf"bytes {at}-", response.headers.get("Content-Range", "")):
                    raise Transient("the server answers with another range")
            elif at != 0 or len(out) != file.size:
                if urlsplit(url).netloc in self._ranged:
                    raise Transient("the server gives the whole file in place of a range")
                raise no_ranges(file.shown)
            return self._read(response, out)
        finally:
            _done(response)

    def _read(self, response: Any, out: memoryview) -> int:
        done = 0
        try:
            while done < len(out) and (piece := response.read(min(PIECE_BYTES, len(out) - done), decode_content=False)):
                out[done : done + len(piece)] = piece
                done += len(piece)
        except self._urllib3.exceptions.HTTPError as e:
            raise Transient(_reason(e), done) from e
        except OSError as e:
            raise Transient(e.strerror or type(e).__name__, done) from e
        return done

    def _get(self, url: str, first: str, bytes_: str, shown: str, *, token: bool) -> tuple[Any, str]:
        """Send a request and follow redirects; return the last answer, and the version stated by the first answer that has one."""
        exceptions, version = self._urllib3.exceptions, ""
        for _ in range(REDIRECTS):
            headers = {"Range": bytes_, "Accept-Encoding": "identity", "User-Agent": f"streamer/{__version__}"}
            if _host(url) == _host(first):
                headers |= _authorization(first, token=token)
            timeout = self._urllib3.Timeout(connect=CONNECT_SECONDS, read=silence_allowed())
            try:
                response = _pool(_proxy(url)).request("GET", _without_user(url), headers=headers, preload_content=False, redirect=False,
                                                      retries=False, timeout=timeout)  # fmt: skip
            except exceptions.SSLError as e:
                raise StorageError(f"{shown}: its server's certificate does not hold: {_reason(e)}") from e
            except (exceptions.LocationValueError, exceptions.URLSchemeUnknown, UnicodeError) as e:
                raise StorageError(f"{shown}: is no address that can be asked; check it") from e
            except exceptions.HTTPError as e:
                raise Transient(_reason(e)) from e
            if not version:
                version = response.headers.get("X-Linked-Etag") or ""
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                found = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
                if url != first and response.status in (200, 206):
                    with self._lock:
                        self._located[first] = url
                return response, version or found
            _done(response)
            url = urljoin(url, location)
        raise StorageError(f"{shown}: leads on and on from one address to another; check it")


def _urllib3() -> Any:
    return require_package("urllib3", (2,), "reading from addresses needs urllib3 2", "remote")


@cache
def _pool(proxy: str) -> Any:
    urllib3 = _urllib3()
    options: dict[str, Any] = {
        "maxsize": CONNECTIONS,
        "num_pools": CONNECTIONS,
        "ssl_context": ssl.create_default_context(),
    }
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)


def _proxy(url: str) -> str:
    """Return the proxy that the environment sets for a URL; empty for none."""
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    return urllib.request.getproxies().get(parts.scheme, "")


def _authorization(url: str, *, token: bool) -> dict[str, str]:
    if token:
        hub: Any = require_package("huggingface_hub", (0, 25), "reading from the hub needs huggingface_hub 0.25", "hub")
        given = hub.get_token()
        return {"Authorization": f"Bearer {given}"} if given else {}
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    made: dict[str, str] = _urllib3().util.make_headers(
        basic_auth=f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    )
    return made


def _host(url: str) -> tuple[str, str]:
    """Return the scheme and the host with port, to which an authorization applies: redirects rarely repeat the user."""
    parts = urlsplit(_without_user(url))
    return parts.scheme, parts.netloc.lower().removesuffix({"http": ":80", "https": ":443"}.get(parts.scheme, ":"))


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _total(response: Any) -> int | None:
    """Read the size of the whole file from the answer to a range request; None if not stated."""
    found = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    if found:
        return int(found[1])
    length = response.headers.get("Content-Length", "")
    return int(length) if response.status == 200 and length.isdecimal() else None


def _refuse_encoded(response: Any, shown: str) -> None:
    """Refuse an answer that is compressed although the request excluded it: its bytes are not the file's."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedError(
            f"{shown}: the server sent this file compressed ({encoding[:40]}), expected it uncompressed; download it and name the directory"
        )


def _fail(response: Any, shown: str) -> NoReturn:
    """Raise the error for an unexpected status: transient or not."""
    status = response.status
    if status in TRANSIENT:
        raise Transient(f"status {status}", wait=_retry_after(response))
    raise StorageError(f"{shown}: cannot read: the server answers with status {status}; check the address")


def _retry_after(response: Any) -> float | None:
    stated = response.headers.get("Retry-After")
    if stated is None:
        return None
    try:
        return float(stated) if stated.strip().isdecimal() else parsedate_to_datetime(stated).timestamp() - time.time()
    except (TypeError, ValueError):
        return None


def _reason(e: Exception) -> str:
    """Describe a connection error briefly."""
    kinds = {"ReadTimeoutError": f"no byte came for {silence_allowed():g} s", "ConnectTimeoutError": "nothing answers",
             "NewConnectionError": "nothing answers", "NameResolutionError": "its name leads to no server",
             "IncompleteRead": "the answer ended early"}  # fmt: skip
    if (found := kinds.get(type(e).__name__)) is not None:
        return found
    inner = next((arg for arg in e.args if isinstance(arg, Exception)), None)
    if inner is not None:
        return _reason(inner) if inner is not e else type(e).__name__
    return without_secrets(f"{getattr(e, 'strerror', None) or e or type(e).__name__}")


def _done(response: Any) -> None:
    """Return a connection for reuse, which needs its answer read to the end; close it if much is left."""
    if response.length_remaining is not None and response.length_remaining <= DRAINED_BYTES:
        response.drain_conn()
        response.release_conn()
    else:
        response.close()

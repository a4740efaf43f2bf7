"""Distinguish addresses and hub names from paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from streamer.errors import UsageError
from streamer.storage.remote_buckets import SCHEMES

PART = r"[A-Za-z0-9_][\w.-]*"

_HUB_NAME = re.compile(rf"(?P<repo>{PART}/{PART})(?:@(?P<revision>[^/@]+))?(?:/(?P<inside>{PART}(?:/{PART})*))?/?")
_HUB_PAGE = re.compile(
    rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>{PART}/{PART})"
    rf"(?:/(?:tree|resolve|blob)/(?P<revision>[^/]+)(?:/(?P<inside>{PART}(?:/{PART})*))?)?/?"
)
_SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+)://")


@dataclass(frozen=True)
class HubName:
    """Model or adapter on the hub.

    Attributes
    ----------
    repo
        ``owner/name``.
    revision
        Branch, tag or commit; None for the newest.
    inside
        Directory or file in the repository; empty for the whole repository.
    """

    repo: str
    revision: str | None
    inside: str
    shown: str


@dataclass(frozen=True)
class Url:
    """Directory or file at an address.

    Attributes
    ----------
    text
        The address; it may contain a password, or a signature in its query.
    shown
        The address without them.
    """

    text: str
    shown: str

    @property
    def name(self) -> str:
        """Return the last part of its path, or ``model`` if that is not a plain name; it becomes a local directory's name."""
        last = unquote(self.shown.rstrip("/").rpartition("/")[2])
        return last if re.fullmatch(r"\w[\w.+=@ -]{0,199}", last) else "model"

    def below(self, name: str) -> tuple[str, str]:
        """Return the address of a file in this directory, and the same address for display."""
        parts = urlsplit(self.text)
        inside = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
        return inside, f"{self.shown.rstrip('/')}/{name}"


def parse_address(text: str) -> HubName | Url | None:
    """Parse a user's input as a hub name, an address, or (None) a path.

    Anything that exists is a path. So is anything that begins like a path or lies in an existing directory, because a mistyped path looks
    like a hub name.

    Raises
    ------
    UsageError
        If an address has an unknown scheme.
    """
    if os.path.lexists(text):
        return None
    if found := _HUB_PAGE.fullmatch(text):
        return HubName(found["repo"], found["revision"], found["inside"] or "", text)
    if found := _SCHEME.match(text):
        scheme, rest = found["scheme"], text[found.end() :]
        if scheme == "hf":
            named = _HUB_NAME.fullmatch(rest.removeprefix("models/"))
            if named is None:
                raise UsageError(f"{text}: expected hf://OWNER/NAME, hf://OWNER/NAME@REVISION or a directory inside")
            return HubName(named["repo"], named["revision"], named["inside"] or "", text)
        if scheme in ("http", "https") or scheme in SCHEMES:
            return Url(text, _without_secrets(text))
        known = ", ".join(f"{name}://" for name in ("hf", "https", "s3", "gs", "az"))
        raise UsageError(
            f"{_without_secrets(text)}: expected a path, a name on the hub, or an address that begins with one of {known}"
        )
    named = _HUB_NAME.fullmatch(text)
    if named is None or Path(text).parts[0] in (".", "..") or Path(Path(text).parts[0]).exists():
        return None
    if not named["inside"] and named["repo"].endswith(".safetensors"):
        return None
    return HubName(named["repo"], named["revision"], named["inside"] or "", text)


def _without_secrets(text: str) -> str:
    parts = urlsplit(text)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))

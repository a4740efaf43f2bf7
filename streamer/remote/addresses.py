"""Tell addresses and names on the hub from paths."""

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
    """A model or adapter on the hub.

    Attributes
    ----------
    repo
        ``owner/name``.
    revision
        A branch, tag or commit; None for the newest.
    inside
        A directory in it, or a file; empty for the whole.
    """

    repo: str
    revision: str | None
    inside: str
    shown: str


@dataclass(frozen=True)
class Url:
    """A directory or a file at an address.

    Attributes
    ----------
    text
        Which may hold a user's password, or a signature in its query.
    shown
        The same without them.
    """

    text: str
    shown: str

    @property
    def name(self) -> str:
        """The last part of its path, ``model`` where that is no plain name: it becomes one of a directory here."""
        last = unquote(self.shown.rstrip("/").rpartition("/")[2])
        return last if re.fullmatch(r"\w[\w.+=@ -]{0,199}", last) else "model"

    def below(self, name: str) -> tuple[str, str]:
        """Return the address of a file in this directory, and what is shown of it."""
        parts = urlsplit(self.text)
        inside = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
        return inside, f"{self.shown.rstrip('/')}/{name}"


def parse_address(text: str) -> HubName | Url | None:
    """Read what a user gave as an input: a name on the hub, an address, or (None) a path.

    What exists is a path. So is what begins like one, or lies in a directory that exists: a mistyped path looks like a name on the hub.

    Raises
    ------
    UsageError
        For an address of an unknown scheme.
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
        raise UsageError(f"{_without_secrets(text)}: expected a path, a name on the hub, or an address of {known}")
    named = _HUB_NAME.fullmatch(text)
    if named is None or Path(text).parts[0] in (".", "..") or Path(Path(text).parts[0]).exists():
        return None
    if not named["inside"] and named["repo"].endswith(".safetensors"):
        return None
    return HubName(named["repo"], named["revision"], named["inside"] or "", text)


def _without_secrets(text: str) -> str:
    parts = urlsplit(text)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))

"""What a power cut leaves: a run's recorded calls, replayed onto a disk that forgets what was not synced.

The disk keeps its promises and no more. What fsync of a file covers is its bytes; what fsync of a directory covers is the names in it.
Everything since is lost, kept or torn, as `leave` is told.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shim import Call

SECTOR = 512

WAYS = ("nothing", "names", "in order", "at random")
"""Of what was not synced: nothing is kept; all names and no bytes; a first part of the names and any bytes; any of both."""


@dataclass
class _File:
    """The bytes that are safe, and the changes since."""

    safe: bytes = b""
    since: list[tuple[int, bytes]] = field(default_factory=list)

    def synced(self) -> None:
        self.safe = self.after(self.since)
        self.since = []

    def after(self, changes: Sequence[tuple[int, bytes]]) -> bytes:
        out = bytearray(self.safe)
        for at, data in changes:
            if at < 0:  # a truncation
                del out[-at - 1 :]
                continue
            out.extend(bytes(max(0, at + len(data) - len(out))))
            out[at : at + len(data)] = data
        return bytes(out)

    @property
    def length(self) -> int:
        return len(self.after(self.since))


Name = tuple[str, str | None, "_File | None"]
"""A change of names: one that goes, one that comes, and the file that it is then the name of."""


class Disk:
    """A directory tree as the system sees it, and as the platters have it; what is there now is safe."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = {
            str(path): _File(path.read_bytes()) for path in root.rglob("*") if path.is_file()
        }
        self.safe_names = dict(self.names)
        self.since: list[Name] = []

    def apply(self, call: Call) -> None:
        """One recorded call."""
        match call.op:
            case "c":
                self._rename("", call.path, _File())
            case "r":
                self._rename(call.path, call.to, self.names[call.path])
            case "u":
                self._rename(call.path, None, None)
            case "s" if call.path in self.names:
                self.names[call.path].synced()
            case "s":
                mine = [n for n in self.since if self._directory(n) == call.path]
                self.since = [n for n in self.since if n not in mine]
                self.safe_names = _renamed(self.safe_names, mine)
            case "w":
                self.names[call.path].since.append((call.offset, call.data))
            case "e" if call.length > self.names[call.path].length:
                self.names[call.path].since.append((call.length, b""))
            case "t":
                self.names[call.path].since.append((-call.length - 1, b""))

    def _rename(self, gone: str, name: str | None, file: _File | None) -> None:
        change = gone, name, file
        self.names = _renamed(self.names, [change])
        self.since.append(change)

    @staticmethod
    def _directory(change: Name) -> str:
        return str(Path(change[1] or change[0]).parent)

    def leave(self, way: str, rng: random.Random, target: Path) -> None:
        """Write what a power cut leaves, one of `WAYS`, into a directory in the place of the root."""
        kept = {
            "nothing": [],
            "names": self.since,
            "in order": self.since[: rng.randrange(len(self.since) + 1)],
            "at random": [n for n in self.since if rng.random() < 0.5],
        }[way]
        target.mkdir()
        for name, file in _renamed(self.safe_names, kept).items():
            path = target / Path(name).relative_to(self.root)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_bytes(file, way, rng))


def _renamed(names: dict[str, _File], changes: Sequence[Name]) -> dict[str, _File]:
    out = dict(names)
    for gone, name, file in changes:
        out.pop(gone, None)
        if name is not None and file is not None:
            out[name] = file
    return out


def _bytes(file: _File, way: str, rng: random.Random) -> bytes:
    if way == "nothing":
        return file.safe
    if way == "names":  # of the right length, and empty
        return file.safe.ljust(file.length, b"\0")[: file.length]
    return file.after([(at, _torn(data, rng)) for at, data in file.since if rng.random() < 0.7])


def _torn(data: bytes, rng: random.Random) -> bytes:
    """A write of which some sectors arrived, or its first part."""
    kind = rng.randrange(3)
    if kind == 0:
        return data
    if kind == 1:
        return data[: rng.randrange(len(data) + 1)]
    sectors = [data[i : i + SECTOR] for i in range(0, len(data), SECTOR)]
    return b"".join(s if rng.random() < 0.5 else bytes(len(s)) for s in sectors)

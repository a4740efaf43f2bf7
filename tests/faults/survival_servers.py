"""Faults of servers: a base and an adapter are at an address, requests for the base go wrong, and afterwards all is well again.

A request fails once, or all do from one on; the files, or what the server says of them, change in mid-run; a token is refused; the run is
killed. Requests are those of real runs to a real server on this machine.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import remote_jobs
import survival_calls
from forks import KILL, server
from helpers import tree_digest
from hub_server import TOKEN, HubHandler
from jobs import Case
from range_server import PEEK, RangeServer, serving
from trials import Tally

COMMANDS = {
    "detect, streamed": "detect --remote stream",
    "mitigate, streamed": "mitigate --lambda 0.5 --remote stream",
    "merge, streamed": "merge --lambda 0.5 --remote stream",
    "merge, downloaded": "merge --lambda 0.5 --remote cache",
    "merge from the hub": "merge --lambda 0.5 --remote stream",
}

FEW_TRIES = "import streamer.storage.remote_source as access; access.TRIES = access.FIRST_TRIES = 2"
"""Code that lets a run give a server up in a second."""

SHORT_WAITS = "import streamer.storage.remote_source as access; sleep = access._sleep; access._sleep = lambda s: sleep(s / 10)"
"""Code that lets a run try again sooner."""

STALL = 1.0

IMPATIENT = "os.environ['STREAMER_REMOTE_TIMEOUT'] = '0.5'"
"""Code that lets a run abandon a stalled request. For other faults it waits longer, because a busy machine may answer late."""

OF_DATA = {"stall", "reset", "short", "whole"}
"""Faults that what is asked first of a file, its size and version, does not mind."""


@dataclass(frozen=True)
class Service:
    """A command on inputs that a server gives.

    Attributes
    ----------
    cache
        The user's cache, where it is downloaded to.
    listed, asked
        Requests for files of the base in an uninterrupted run: those before the first for data of its shards, and all.
    every
        Of the requests, only each n-th is disturbed.
    """

    case: Case
    site: RangeServer
    home: Path
    cache: Path
    listed: int
    asked: int
    every: int
    rng: random.Random

    def places(self, first: int = 1) -> Iterator[tuple[int, Path]]:
        """Give every n-th request from `first` on, and an output for it; the cache is empty each time."""
        span = self.asked - first + 1
        for n in range(
            first + self.rng.randrange(max(1, min(self.every, span))), self.asked + 1, self.every
        ):
            self.empty_cache()
            yield n, self.home / f"out-{n}"

    @property
    def files(self) -> Path:
        """The directory of the base."""
        return next(
            path
            for path in (self.site.root / "base", self.site.root / "owner" / "base")
            if path.is_dir()
        )

    def empty_cache(self) -> None:
        """Let the next run download what it needs."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def end(self, tally: Tally, out: Path, what: str, faults: int = 1) -> None:
        """Look at what a run left in the cache, and then as `Tally.end` does."""
        served = {path.name: path.read_bytes() for path in self.files.iterdir() if path.is_file()}
        for path in (self.cache / "streamer" / "files").rglob("model-*"):
            if path.read_bytes() != served[path.name]:
                tally.lost += 1
                tally.problems.append(f"{what}: {path.name} in the cache is not what was served")
        tally.end(self.case, out, what, faults)


class Disturbance:
    """A fault of one request for files of the base, or of all from it on; what else is to happen then is done once."""

    def __init__(
        self,
        kind: str | None,
        first: int,
        lasts: bool = False,
        act: Callable[[str], None] | None = None,
    ) -> None:
        self.hits = 0
        self._kind = kind
        self._first = first
        self._lasts = lasts
        self._act = act
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def __call__(self, path: str, _before: int) -> str | None:
        """Answer as `RangeServer.fault` does."""
        if "base/" not in path:
            return None
        with self._lock:
            n = next(self._numbers)
            if n != self._first and not (self._lasts and n > self._first):
                return None
            self.hits += 1
            if self._act is not None and self.hits == 1:
                self._act(path)
            return self._kind


@contextlib.contextmanager
def disturbed(site: RangeServer, disturbance: Disturbance) -> Iterator[None]:
    """Let requests go wrong; afterwards none does."""
    site.fault = site.peek_fault = disturbance
    try:
        yield
    finally:
        site.fault = site.peek_fault = lambda path, n: None
        site.tags.clear()


def passing(service: Service, kind: str) -> Tally:
    """One request fails: nothing is noticed. A whole file at first sight is another matter: the server gives no ranges, and is refused."""
    tally = Tally()
    for n, out in service.places(service.listed + 1 if kind == "whole" else 1):
        what = f"{kind} at request {n}"
        with disturbed(service.site, Disturbance(kind, n)):
            done = service.case.run(out, before=IMPATIENT if kind == "stall" else "")
        # A hub's answer for a shard may be the first that is seen of it.
        refused_at_once = (
            kind == "whole"
            and service.site.root.name == "hub"
            and "gives whole files only" in done.told
        )
        tally.begin(done.code, {3} if refused_at_once else {0}, what)
        if done.told and not refused_at_once:
            tally.problems.append(f"{what}: said {done.told!r}")
        service.end(tally, out, what)
    return tally


def lasting(service: Service, kind: str) -> Tally:
    """All requests fail from one on: exit 6 in one line, or 0, where none was needed; exit 3 where no range was ever given."""
    tally = Tally()
    for n, out in service.places():
        what = f"{kind} from request {n} on"
        disturbance = Disturbance(kind, n, lasts=True)
        with disturbed(service.site, disturbance):
            done = service.case.run(
                out, before="; ".join([FEW_TRIES, *[IMPATIENT] * (kind == "stall")])
            )
        passed = {0} if kind in OF_DATA or not disturbance.hits else set()
        tally.begin(done.code, {6, *passed, *({3} if kind == "whole" else ())}, what)
        tally.refused(done.code, done.told, what)
        service.end(tally, out, what)
    return tally


def asked_to_wait(service: Service) -> Tally:
    """The server asks to wait for longer than anyone would: exit 6 at once."""
    service.site.retry_after = 1000
    try:
        return lasting(service, "429")
    finally:
        service.site.retry_after = 0


def refused(service: Service, status: str, lasts: bool = False) -> Tally:
    """It may not be read any more: exit 3 where nothing has begun, 6 in mid-run."""
    tally = Tally()
    for n, out in service.places():
        what = f"{status} at request {n}"
        disturbance = Disturbance(status, n, lasts)
        with disturbed(service.site, disturbance):
            done = service.case.run(out)
        expected = {3, 6} if n <= service.listed else {6}
        if (
            not lasts and service.site.root.name == "hub"
        ):  # where a file is led on to, it may have expired, and is led on to anew
            expected |= {0}
        tally.begin(done.code, expected if disturbance.hits else {0}, what)
        tally.refused(done.code, done.told, what)
        if TOKEN in done.err:
            tally.problems.append(f"{what}: printed the token")
        service.end(tally, out, what)
    return tally


def changed(service: Service, how: str) -> Tally:
    """A file changes in mid-run, or only its ETag: exit 8 and no commit point, or the whole output, where all had been read."""
    tally = Tally()
    files = service.files
    aside = service.home / "aside"
    shutil.copytree(files, aside, dirs_exist_ok=True)

    def replace(path: str) -> None:
        name = path.rpartition("/")[2]
        new = files.parent / "new"
        data = (aside / name).read_bytes()
        new.write_bytes(data[: len(data) // 3] + data[len(data) // 3 :][::-1])
        new.replace(files / name)

    for n, out in service.places(service.listed + 1):
        what = f"another {how} at request {n}"
        disturbance = (
            Disturbance("changed", n) if how == "ETag" else Disturbance(None, n, act=replace)
        )
        with disturbed(service.site, disturbance):
            done = service.case.run(out)
        tally.begin(done.code, {0, 8}, what)
        tally.refused(done.code, done.told, what)
        if (done.code == 8) == service.case.committed(out):
            tally.problems.append(f"{what}: exit {done.code} with {sorted(os.listdir(out))}")
        for path in aside.iterdir():
            shutil.copy2(path, files / path.name)
        service.end(tally, out, what)
    return tally


def other_bytes(service: Service) -> Tally:
    """After a kill the server gives other bytes of the same ETag and size: where samples see them, exit 4, and no file is touched."""
    tally = Tally()
    files = service.files
    aside = service.home / "aside"
    shutil.copytree(files, aside, dirs_exist_ok=True)
    tags = {
        f"base/{path.name}": service.site.tag(path, f"base/{path.name}") for path in files.iterdir()
    }
    for n, out in service.places(service.listed + 1):
        what = f"other bytes after call {n}"
        if (
            service.case.run(
                out, at=max(2, n * len(service.case.calls) // service.asked), code=KILL
            ).code
            == 0
        ):
            shutil.rmtree(out)
            continue
        service.site.tags.update(tags)
        for path in files.glob("model-*.safetensors"):
            data = path.read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            path.write_bytes(data[:start] + bytes(len(data) - start))
        before = _named(out)
        done = service.case.run(out)
        tally.begin(done.code, {3, 4}, what)
        tally.refused(done.code, done.told, what)
        if _named(out) != before:
            tally.problems.append(f"{what}: changed files of the output")
        for path in aside.iterdir():
            shutil.copy2(path, files / path.name)
        service.site.tags.clear()
        service.end(tally, out, what)
    return tally


def _named(out: Path) -> dict[str, str]:
    """Digests of the files under final names."""
    return {
        name: digest
        for name, digest in tree_digest(out).items()
        if not Path(name).name.startswith(".")
    }


def killed(service: Service) -> Tally:
    """A kill while a request is answered."""
    tally = Tally()
    for n, out in service.places():
        what = f"kill at request {n}"
        disturbance = Disturbance(None, n, act=lambda _: os.kill(server().running, signal.SIGKILL))
        with disturbed(service.site, disturbance):
            done = service.case.run(out)
        if disturbance.hits:
            tally.begin(done.code, {-signal.SIGKILL}, what)
        else:  # a run that repeated no request needs fewer
            tally.runs += 1
        service.end(tally, out, what, disturbance.hits)
    return tally


def killed_at_random(service: Service, kills: int) -> Tally:
    """Kill at random moments, of downloads too."""
    return survival_calls.killed_at_random(
        service.case,
        service.home,
        kills,
        service.rng,
        partial(Service.end, service),
        service.empty_cache,
    )


KINDS: dict[str, Callable[[Service], Tally]] = {
    **{f"server: {kind}, once": lambda s, kind=kind: passing(s, kind)
       for kind in ("stall", "reset", "429", "500", "short", "whole")},
    **{f"server: {kind}, lasting": lambda s, kind=kind: lasting(s, kind)
       for kind in ("stall", "reset", "429", "500", "short", "whole")},
    "server: asks to wait": asked_to_wait,
    "server: 401": lambda s: refused(s, "401"),
    "server: 403": lambda s: refused(s, "403"),
    "server: token refused": lambda s: refused(s, "401", lasts=True),
    "server: other ETag": lambda s: changed(s, "ETag"),
    "server: other file": lambda s: changed(s, "file"),
    "server: other bytes": other_bytes,
    "server: kill": killed,
}  # fmt: skip

NOT_THERE = {
    "merge, downloaded": {"server: other bytes"},  # what was downloaded is not read again
    "merge from the hub": {
        "server: other bytes",
        "server: other ETag",
        "server: other file",
    },  # a commit does not change
}
"""Faults that cannot happen to a command."""


@contextlib.contextmanager
def services(
    home: Path, every: int, seed: str, commands: list[str]
) -> Iterator[Iterator[tuple[str, Service]]]:
    """Serve a small base and an adapter, and give the commands on them, each with what an uninterrupted run writes."""
    files = remote_jobs.world(home / "files")
    hub = home / "hub"
    for name in ("base", "adapter"):
        shutil.copytree(files / name, hub / "owner" / name)
    with serving(files, stall=STALL) as web, serving(hub, HubHandler, stall=STALL) as models:

        def made() -> Iterator[tuple[str, Service]]:
            for command in commands:
                site = models if command.endswith("hub") else web
                yield (
                    command,
                    _service(command, site, home / command.replace(" ", "-"), every, seed),
                )

        yield made()


def _service(command: str, site: RangeServer, home: Path, every: int, seed: str) -> Service:
    cache = home / "cache"
    environment = {
        "XDG_CACHE_HOME": str(cache),
        "STREAMER_REMOTE_TIMEOUT": "20",
        "HF_HOME": str(cache / "hf"),
        "HF_ENDPOINT": site.address,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    inputs = (
        ("owner/base", "owner/adapter")
        if command.endswith("hub")
        else (f"{site.address}/base", f"{site.address}/adapter")
    )
    verb, *options = COMMANDS[command].split()
    case = Case(
        (verb, *inputs, *options),
        server(),
        before=f"os.environ.update({environment}); {SHORT_WAITS}",
    )
    out = home / "whole"
    home.mkdir(parents=True)
    site.reset()
    done = case.run(out)
    assert (done.code, done.told) == (0, ""), done
    # Those for files that are not there cannot go wrong.
    files = {p.name for p in site.root.rglob("*") if p.is_file()}
    asked = [r for r in site.requests if "base/" in r.path and r.path.rpartition("/")[2] in files]
    data = [request.range != PEEK and "/model-" in request.path for request in asked]
    listed = data.index(True)
    whole = tree_digest(out)
    shutil.rmtree(out)
    case = Case(case.argv, case.server, whole, tuple(done.calls), before=case.before)
    return Service(case, site, home, cache, listed, len(asked), every, random.Random(seed))

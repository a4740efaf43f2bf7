"""An output directory of four files: its plan, carried out whole or until a file, what is refused without a change, and a lock."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from helpers import tree_digest

from streamer.errors import StreamerError
from streamer.storage.files import locked
from streamer.storage.transaction import (
    JOURNAL_NAME,
    RECORD_NAME,
    OutputDirectory,
    OutputPlan,
    inspect_output,
    open_outputs,
)

DATA = {
    "sub/config.json": b"{}",
    "model-1": bytes(range(100)),
    "model-2": b"\x01" * 50,
    "index.json": b'{"weight_map": {}}',
}


INDEX = "index.json"


@dataclasses.dataclass
class Case:
    """A plan and its input directory."""

    base: Path
    plan: OutputPlan

    @property
    def out(self) -> Path:
        return self.plan.path

    def other(self, digest: str = "another") -> OutputPlan:
        """Another plan for the same place."""
        return dataclasses.replace(self.plan, digest=digest)


def make_case(directory: Path) -> Case:
    base = directory / "base"
    (base / "sub").mkdir(parents=True)
    (base / "sub" / "config.json").write_bytes(DATA["sub/config.json"])
    files = tuple((name, len(data)) for name, data in DATA.items())
    plan = OutputPlan(
        directory / "out",
        files,
        "digest",
        {"base/x": (1, 2, 3, 4)},
        (base,),
        ("model.safetensors",),
    )
    return Case(base, plan)


class Killed(BaseException):
    """The process ends here: nothing that runs afterwards may be counted on."""


def carry_out(
    case: Case,
    plan: OutputPlan | None = None,
    until: str = "",
    contents: Mapping[str, bytes] = DATA,
    **options: bool,
) -> list[str]:
    """Carry a plan out, up to the file `until`; the names that were written."""
    written = []
    with open_outputs([plan or case.plan], **options) as (out,):
        for name, data in contents.items():
            if name == until:
                raise Killed
            if out.finished(name) is None:
                put(out, case, name, data)
                written.append(name)
            assert out.entry(name)["bytes"] == len(data)
        out.commit({"schema": "streamer.output/2", "made": "here"})
    return written


def put(out: OutputDirectory, case: Case, name: str, data: bytes) -> None:
    with out.file(name, len(data)) as f:
        if (case.base / name).exists():
            f.copy(case.base / name)
        else:
            f.write(data)


def interrupt(case: Case, until: str = "model-2", plan: OutputPlan | None = None) -> None:
    with pytest.raises(Killed):
        carry_out(case, plan, until)
    assert (case.out / JOURNAL_NAME).exists()


def run(
    begin: Callable[..., object], plan: OutputPlan, overwrite: bool = False, resume: bool = True
) -> None:
    if begin is open_outputs:
        with open_outputs([plan], overwrite, resume):
            raise AssertionError("begun")
    begin(plan, overwrite, resume)


def refusal(
    kind: type[StreamerError], case: Case, plan: OutputPlan | None = None, **options: bool
) -> str:
    """The one line of a refusal, by the preflight and under the lock alike; neither touches what is there."""
    before = tree_digest(case.out.parent)
    messages = set()
    for begin in (inspect_output, open_outputs):
        with pytest.raises(kind) as caught:
            run(begin, plan or case.plan, **options)
        assert type(caught.value) is kind
        messages.add(str(caught.value))
    assert tree_digest(case.out.parent) == before
    (message,) = messages
    assert "\n" not in message
    return message


@contextlib.contextmanager
def copied_at(home: Path, *calls: str, after: bool = False) -> Iterator[list[Path]]:
    """Copy a directory before each of these system calls, and after it too: what a kill there would leave; equal copies once."""
    copies: list[Path] = []
    seen: list[dict[str, str]] = []

    def keep() -> None:
        if home.exists() and (found := tree_digest(home)) not in seen:
            seen.append(found)
            copies.append(shutil.copytree(home, home.parent / f"copy{len(copies)}", symlinks=True))

    def watched(real: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            keep()
            result = real(*args, **kwargs)
            if after:
                keep()
            return result

        return run

    with pytest.MonkeyPatch.context() as m:
        for call, wrapped in [(call, watched(getattr(os, call))) for call in calls]:
            m.setattr(os, call, wrapped)
        yield copies


def check_whole(case: Case, digest: str = "digest") -> None:
    assert {n: (case.out / n).read_bytes() for n in DATA} == DATA
    assert tree_digest(case.out).keys() == {*DATA, RECORD_NAME}
    assert json.loads((case.out / RECORD_NAME).read_text())["plan"] == digest


def take(path: Path) -> None:
    """Take a lock, and let it go."""
    with locked(path):
        assert path.exists()

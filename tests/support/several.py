"""Three adapters of different kinds on one base: what each alone gives, and the command line for all."""

from __future__ import annotations

import shutil
from pathlib import Path

import jobs
from forks import server

NAMES = ["dora", "lora", "saved"]


WAYS = ["detect", "merge --lambda 0.5", "merge --lambda 0.5 --findings", "mitigate --lambda 0.5 --to-lora 3 --findings"]


def run(*argv: object, code: int = 0) -> str:
    """Run a command; what it prints, or the error."""
    done = server().run(*argv)
    assert done.code == code, done.err
    return done.out if code == 0 else done.err


class Several:
    """A base, a directory of three adapters of different kinds, and what each alone gives, by way and name."""

    def __init__(self, home: Path) -> None:
        self.base, self.adapters = jobs.several(home)
        self.single, self.home = home / "single", home
        self.findings = home / "findings"
        (self.single / "detect").mkdir(parents=True)
        self.findings.mkdir()
        for name in NAMES:
            run("detect", self.base, self.adapters / name, "-o", self.findings / f"{name}.safetensors")
        shutil.copytree(self.findings, self.single / "detect", dirs_exist_ok=True)
        for way in WAYS[1:]:
            verb, *options = way.split()
            for name in NAMES:
                given = [self.findings / f"{name}.safetensors"] if "--findings" in options else []
                run(verb, self.base, self.adapters / name, *options, *given, "-o", self.single / way / name)

    def line(self, way: str, out: Path, *adapters: Path) -> list[object]:
        """The command line for all."""
        verb, *options = way.split()
        given = [self.findings] if "--findings" in options else []
        return [verb, self.base, *(adapters or [self.adapters]), *options, *given, "-o", out]

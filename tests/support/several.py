"""Three adapters of different kinds on one base: what each alone gives, and the command line for all."""

from pathlib import Path

import jobs
from forks import server

NAMES = ["dora", "lora", "saved"]


WAYS = [
    "detect",
    "merge --lambda 0.5",
    "merge --lambda 0.5 --findings",
    "mitigate --lambda 0.5 --to-lora 3 --findings",
]


def run(*argv: object, code: int = 0) -> str:
    """Run a command; what it prints, or the error."""
    done = server().run(*argv)
    assert done.code == code, done.err
    return done.out if code == 0 else done.err


class Several:
    """A base, a directory of three adapters of different kinds, their findings, and what each alone gives."""

    def __init__(self, home: Path) -> None:
        self.base, self.adapters = jobs.several(home)
        self.home = home
        self.findings = home / "findings"
        self.findings.mkdir()
        for name in NAMES:
            run(
                "detect",
                self.base,
                self.adapters / name,
                "-o",
                self.findings / f"{name}.safetensors",
            )

    def alone(self, way: str) -> Path:
        """The directory of what each alone gives, made when it is first asked for."""
        verb, *options = way.split()
        if verb == "detect":
            return self.findings
        place = self.home / "alone" / way
        for name in NAMES if not place.exists() else ():
            given = [self.findings / f"{name}.safetensors"] if "--findings" in options else []
            run(verb, self.base, self.adapters / name, *options, *given, "-o", place / name)
        return place

    def line(self, way: str, out: Path, *adapters: Path) -> list[object]:
        """The command line for all."""
        verb, *options = way.split()
        given = [self.findings] if "--findings" in options else []
        return [verb, self.base, *(adapters or [self.adapters]), *options, *given, "-o", out]

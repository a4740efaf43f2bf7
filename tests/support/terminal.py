"""Commands at a terminal of a given size: every screen that they draw, and the last one, as a terminal shows them."""

import contextlib
import os
import pty
import termios
import threading
from dataclasses import dataclass

import pyte
from forks import server

ROWS = 120
"""Rows of the terminal: more than any command here prints, so that nothing scrolls away."""

REDRAWN = b"\r"
"""What each drawing of the bar begins with."""


@dataclass(frozen=True)
class Shown:
    """What a terminal showed.

    Attributes
    ----------
    drawn
        The bytes that came.
    during
        Lines that stood on the screen at some time, in the order in which they came.
    last
        The lines at the end.
    """

    code: int
    drawn: bytes
    during: list[str]
    last: list[str]


def show(columns: int, *argv: object, env: dict[str, str] | None = None, code: str = "") -> Shown:
    """Run `streamer` on a terminal of so many columns, its stdin, stdout and stderr; `code` runs there before it."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (ROWS, columns))
    pieces: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux says EIO when the other side has closed
            while piece := os.read(ours, 1 << 16):
                pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    own = {"TERM": "xterm", **(env or {})}
    done = server().run(*argv, before=TERMINAL.format(name=os.ttyname(theirs), env=own) + code)
    os.close(theirs)
    reader.join()
    os.close(ours)
    screen = pyte.Screen(columns, ROWS)
    stream = pyte.ByteStream(screen)
    during: dict[str, None] = {}
    for at, part in enumerate(b"".join(pieces).split(REDRAWN)):
        stream.feed(REDRAWN * bool(at) + part)
        during |= dict.fromkeys(lines(screen))
    return Shown(done.code, b"".join(pieces), list(during), lines(screen))


TERMINAL = """
fd = os.open({name!r}, os.O_RDWR | os.O_NOCTTY)
for number in range(3):
    os.dup2(fd, number)
os.close(fd)
os.environ.update({env!r})
"""


def lines(screen: pyte.Screen) -> list[str]:
    """The lines on a screen down to the last that is not empty."""
    return "\n".join(line.rstrip() for line in screen.display).rstrip().split("\n")

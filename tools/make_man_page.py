"""Make the man page of `streamer` from its parser: ``python tools/make_man_page.py -o streamer.1``, then ``man -l streamer.1``.

Needs argparse-manpage (``pip install argparse-manpage``). The page has no date, so that the same parser gives the same page.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from streamer import __version__
from streamer.cli.parser import EPILOG, EXAMPLES, build_parser


def man_page() -> str:
    """Render the parser in the language of man pages."""
    from argparse_manpage.manpage import Manpage

    page = Manpage(build_parser())
    page.source = f"streamer {__version__}"
    page.section = "1"
    page.manual = "User Commands"
    page.date = ""
    page.description = "find LoRA intruder dimensions and scale them down"
    body = re.sub(r", \d+ here", "", str(page)).partition(".SH COMMENTS\n")[
        0
    ]  # the library would fill the lines
    parts = {"A FIRST RUN, AND EXIT CODES": EPILOG} | {
        f"EXAMPLES OF {c.upper()}": text for c, text in EXAMPLES.items()
    }
    return body + "".join(
        f".SH {title}\n.nf\n{_escaped(text)}.fi\n" for title, text in parts.items()
    )


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("-", "\\-")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the man page of streamer from its parser.")
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: stdout)")
    args = parser.parse_args()
    page = man_page()
    if args.output is None:
        print(page)
    else:
        args.output.write_text(page)


if __name__ == "__main__":
    main()

"""Count tokens of code by folder, without docstrings, comments and layout, and how many a line has.

python tools/count_tokens.py                 the package, the tests and the tools
python tools/count_tokens.py streamer/cli    these files or folders
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
EXCEPTIONS = "# fmt: skip", "# fmt: off"
"""Comments that keep the formatter out."""


class Size(NamedTuple):
    """Tokens of code, the lines on which they lie, and exceptions from the formatter."""

    tokens: int = 0
    lines: int = 0
    exceptions: int = 0

    def plus(self, other: Size) -> Size:
        """Add the size of other code."""
        return Size(*(a + b for a, b in zip(self, other, strict=True)))


def documentation(source: str) -> set[int]:
    """List the lines of strings that are statements by themselves."""
    return {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def size_of(source: str) -> Size:
    """Measure a file."""
    documented = documentation(source)
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in LAYOUT and token.start[0] not in documented
    ]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return Size(len(tokens), len(lines), sum(source.count(exception) for exception in EXCEPTIONS))


def sizes(folder: Path) -> dict[str, Size]:
    """Measure a folder's Python files by the folders in it; its own files count under ``.``."""
    found: dict[str, Size] = {}
    for path in sorted(folder.rglob("*.py")):
        inner = path.relative_to(folder).parts
        name = inner[0] if len(inner) > 1 else "."
        found[name] = found.get(name, Size()).plus(size_of(path.read_text(encoding="utf-8")))
    return found


def total(folder: Path) -> Size:
    """Measure a folder."""
    whole = Size()
    for size in sizes(folder).values():
        whole = whole.plus(size)
    return whole


def row(size: Size, name: str) -> str:
    """Format a line of the table."""
    return f"{size.tokens:9,} {size.tokens / max(1, size.lines):12.1f} {size.exceptions:10}  {name}"


def main() -> None:
    """Print a table a folder."""
    print("   tokens tokens a line exceptions")
    for folder in map(
        Path, sys.argv[1:] or (ROOT / name for name in ("streamer", "tests", "tools"))
    ):
        if folder.is_file():
            print(row(size_of(folder.read_text(encoding="utf-8")), str(folder)))
            continue
        print(row(total(folder), str(folder)))
        for name, size in sorted(sizes(folder).items(), key=lambda pair: -pair[1].tokens):
            print(row(size, f"  {name}"))


if __name__ == "__main__":
    main()

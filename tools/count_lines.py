"""Count lines of code by folder, without docstrings, comments and blank lines.

python tools/count_lines.py                 the package, the tests and the tools
python tools/count_lines.py streamer/cli    these files or folders
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPACE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """Count the lines on which some token of code lies; a string that is a statement by itself is documentation."""
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in SPACE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def count(folder: Path) -> Counter[str]:
    """Count the lines of code of a folder's Python files by the folders in it; its own files count under ``.``."""
    lines: Counter[str] = Counter()
    for path in sorted(folder.rglob("*.py")):
        inner = path.relative_to(folder).parts
        lines[inner[0] if len(inner) > 1 else "."] += code_lines(path.read_text())
    return lines


def main() -> None:
    """Print a table a folder."""
    for folder in map(Path, sys.argv[1:] or (ROOT / name for name in ("streamer", "tests", "tools"))):
        if folder.is_file():
            print(f"{code_lines(folder.read_text()):7,}  {folder}")
            continue
        lines = count(folder)
        print(f"{sum(lines.values()):7,}  {folder}")
        for name, n in lines.most_common():
            print(f"{n:7,}    {name}")


if __name__ == "__main__":
    main()

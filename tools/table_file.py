"""Write a packaged table, or compare it with what the installed transformers says: the command line that all tables' makers have."""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Callable
from pathlib import Path

TABLES = Path(__file__).parent.parent / "streamer" / "plan"


def main(description: str, name: str, make: Callable[[], str]) -> int:
    """Write the table `name` (gzip where it ends in .gz), or with ``--check`` return 1 where its text is not what `make` returns."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    path = TABLES / name
    text = make()
    compressed = path.suffix == ".gz"
    if args.check:
        return int(
            (gzip.decompress(path.read_bytes()) if compressed else path.read_bytes()).decode()
            != text
        )
    # No time stamp, so that equal tables are equal bytes.
    data = gzip.compress(text.encode(), 9, mtime=0) if compressed else text.encode()
    path.write_bytes(data)
    print(f"wrote {path}: {len(data)} bytes", file=sys.stderr)
    return 0

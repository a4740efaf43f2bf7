"""Measure commands on a base at an address: bytes over the network, memory, and time against the same files on the disk.

    python tools/make_checkpoint.py DIR --size-gb 4 --shard-bytes 1e9
    python tools/bench_remote.py DIR [--rate 100] [--commands detect merge]

A server of ranges on this machine serves DIR, once as fast as it goes and once at a rate in MB/s; of the adapter the modules of attention
are taken. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import machine, watched

COMMANDS = ("inspect", "detect", "mitigate", "merge")
SUPPORT = Path(__file__).parent.parent / "tests" / "support"


def attention_adapter(adapter: Path, to: Path) -> Path:
    """Write the part of an adapter that is on attention."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    to.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = [
        name
        for name in config["target_modules"]
        if name in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    (to / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {k: v for k, v in tensors.items() if ".self_attn." in k},
        to / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return to


def arguments(command: str, base: str, adapter: Path, home: Path) -> list[str]:
    """The arguments of a command; all but `inspect` and `detect` take findings."""
    out = {
        "inspect": [],
        "detect": ["-o", f"{home}/found.safetensors"],
        "mitigate": ["-o", f"{home}/adapter"],
        "merge": ["-o", f"{home}/model"],
    }[command]
    found = (
        ["--method", "paper", "--findings", f"{home}/found.safetensors"]
        if command in ("mitigate", "merge")
        else []
    )
    return [sys.executable, "-m", "streamer", command, base, str(adapter), *out, *found, "-q"]


class Served:
    """A server in a process of its own, which says on request how many bytes it has sent."""

    def __init__(self, root: Path, rate: float | None) -> None:
        code = (
            f"import sys; sys.path.insert(0, {str(SUPPORT)!r})\nfrom pathlib import Path\nfrom range_server import serving\n"
            f"with serving(Path({str(root)!r}), rate={rate!r}) as site:\n    print(site.address, flush=True)\n"
            "    for line in sys.stdin:\n        print(site.sent, len(site.requests), flush=True)\n        site.reset()\n"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address = self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def counts(self) -> tuple[int, int]:
        """Bytes and requests since this was asked before."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        sent, requests = self._answer().split()
        return int(sent), int(requests)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measured(
    served: Served | None, base: str, adapter: Path, commands: list[str], home: Path
) -> dict[str, Any]:
    """Figures of each command."""
    figures = {}
    for command in commands:
        if served is not None:
            served.counts()
        done = watched(arguments(command, base, adapter, home))
        figures[command] = {"seconds": round(done.seconds, 2), "anonymous_bytes": done.anonymous}
        if served is not None:
            sent, requests = served.counts()
            figures[command] |= {
                "sent_bytes": sent,
                "requests": requests,
                "MB_a_second": round(sent / done.seconds / 1e6, 1),
            }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="of make_checkpoint.py: base and adapter")
    parser.add_argument(
        "--rate", type=float, default=100, help="of the slow server, in MB/s (default: 100)"
    )
    parser.add_argument(
        "--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="default: all"
    )
    args = parser.parse_args()
    base = args.directory / "base"
    figures: dict[str, Any] = {
        "machine": machine(),
        "base_bytes": sum(p.stat().st_size for p in base.glob("*.safetensors")),
    }
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        home = Path(scratch)
        adapter = attention_adapter(args.directory / "adapter", home / "attention")
        os.environ["XDG_CACHE_HOME"] = str(home / "cache")
        for name, rate in (("disk", None), ("server", None), ("slow_server", args.rate * 1e6)):
            served = None if name == "disk" else Served(args.directory, rate)
            (home / name).mkdir()
            try:
                where = str(base) if served is None else f"{served.address}/base"
                figures[name] = measured(served, where, adapter, args.commands, home / name)
            finally:
                if served is not None:
                    served.close()
            shutil.rmtree(home / name)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

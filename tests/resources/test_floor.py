"""What a process takes before any matrix, gives back, and reads of large files; whether its products in bfloat16 are fast."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
from command_line import ENV
from two_shards import SHARDS, refusal, two_shards

import streamer
from streamer.detection.findings import load_findings
from streamer.errors import MissingInputError
from streamer.storage.checkpoint import INDEX_NAME, open_checkpoint
from streamer.storage.header import layout, parse_header

READ = """
import re
from pathlib import Path

from streamer.plan.plan import PROCESS_BYTES
import streamer.cli.main, streamer.api.intruders

print(PROCESS_BYTES, re.search(r"RssAnon:\\s*([0-9]+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_floor_is_what_this_build_of_torch_takes_whatever_the_program_holds() -> None:
    """Not less than a fresh process holds, nor so much more that small budgets are refused for nothing."""
    fresh, full = (
        [
            int(n)
            for n in subprocess.check_output(
                [sys.executable, "-c", code], text=True, env=ENV
            ).split()
        ]
        for code in (READ, f"data = bytearray(b'x') * (700 << 20)\n{READ}")
    )
    assert fresh[0] == full[0]
    assert full[1] << 10 > 700 << 20
    assert 0.6 * fresh[0] < fresh[1] << 10 < fresh[0]


WAITING = """
import sys, threading
from streamer.storage.files import give_freed_memory_back, limit_freed_memory

def anonymous():
    give_freed_memory_back()
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:")) >> 10

def work():
    for size in (30, 6):
        held = [bytearray(b"x") * (size << 20) for _ in range(4)]
        del held
    freed.set()
    end.wait()

if sys.argv[1] == "limited":
    limit_freed_memory()
freed, end, before = threading.Event(), threading.Event(), anonymous()
thread = threading.Thread(target=work)
thread.start()
freed.wait()
print(anonymous() - before)
end.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's counters")
def test_a_thread_that_waits_keeps_little_of_what_it_freed() -> None:
    kept = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", WAITING, how], stdout=subprocess.PIPE, check=True
            ).stdout
        )
        for how in ("as it is", "limited")
    }
    assert kept["limited"] <= 2
    assert kept["as it is"] > 10, "glibc no longer needs limits"


@pytest.mark.long
def test_a_large_index_is_quick(tmp_path: Path) -> None:
    """200,000 entries: read and compared with the shards in seconds, or refused at the first shard."""
    base = two_shards(tmp_path / "base")
    count = 200_000
    tree = {
        f"layers.{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
        for i in range(count)
    }
    body = json.dumps(tree).encode()
    (base / SHARDS[1]).write_bytes(struct.pack("<Q", len(body)) + body + bytes(count))
    good = {"a": SHARDS[0], "b": SHARDS[0]} | dict.fromkeys(tree, SHARDS[1])
    began = time.process_time()
    (base / INDEX_NAME).write_text(json.dumps({"weight_map": good}))
    assert len(open_checkpoint(base).weight_map) == count + 2
    (base / INDEX_NAME).write_text(
        json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(count)}})
    )
    assert "0.safetensors: no such file" in refusal(MissingInputError, base)
    assert time.process_time() - began < 15


def test_many_tensors_are_quick() -> None:
    began = time.process_time()
    header, raw = layout((f"model.layers.{i}.weight", "BF16", [4, 4]) for i in range(20_000))
    assert len(parse_header(raw, header.file_bytes, "x").by_name) == 20_000
    assert time.process_time() - began < 5


@pytest.mark.long
def test_findings_of_an_80_layer_model_open_few_files(tmp_path: Path) -> None:
    """560 matrices with three factors each, under the usual limit of descriptors."""
    import resource

    names = [f"layers.{i}.q" for i in range(560)]
    base = helpers.write_sharded(
        tmp_path / "base", [{f"{n}.weight": helpers.power_law(64, 48).float() for n in names}]
    )
    adapter = helpers.write_adapter(
        tmp_path / "adapter", {n: helpers.intruding_factors(64, 48, 2) for n in names}, r=2
    )
    streamer.detect_intruder_dimensions(base, adapter, tmp_path / "f.safetensors")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        findings = load_findings(tmp_path / "f.safetensors")
        assert findings.intruders >= 560
        assert sum(float(m.detection.S.sum()) for m in findings) > 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

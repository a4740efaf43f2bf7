"""A fit by inputs has a thread for each group of sequences; memory that one of them frees does not stay with it while it waits."""

from __future__ import annotations

import subprocess
import sys

import pytest

WAITING = """
import sys, threading
from streamer.storage.system import give_freed_memory_back, limit_freed_memory

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
        how: int(subprocess.run([sys.executable, "-c", WAITING, how], stdout=subprocess.PIPE, check=True).stdout)
        for how in ("as it is", "limited")
    }
    assert kept["limited"] <= 2
    assert kept["as it is"] > 10, "glibc no longer needs limits"

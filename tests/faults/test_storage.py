"""Files, locks and outputs of processes that are killed, limited, or read what shrinks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import names, tree_digest
from transactions import INDEX, carry_out, check_whole, make_case, take
from two_shards import SHARDS, two_shards

from streamer.errors import LockedError
from streamer.storage.output_plan import JOURNAL_NAME, LOCK_NAME


def test_a_killed_process_is_taken_up(tmp_path: Path) -> None:
    """A SIGKILL in a process of its own, between a rename and whatever comes next."""
    case = make_case(tmp_path)
    program = f"""
import os, signal
from pathlib import Path
from streamer.storage.output_plan import OutputPlan
from streamer.storage.transaction import open_outputs
plan = OutputPlan(Path({str(case.out)!r}), {case.plan.files!r}, "digest", {case.plan.stamps!r}, ())
real = os.rename
def rename(*args):
    real(*args)
    os.kill(os.getpid(), signal.SIGKILL)
with open_outputs([plan]) as (out,):
    with out.file("sub/config.json", 2) as f:
        f.write(b"{{}}")
    os.rename = rename
    with out.file("model-1", 100) as f:
        f.write(bytes(range(100)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300, check=False)
    assert done.returncode == -9
    assert {p.name for p in case.out.iterdir()} == {"sub", "model-1", JOURNAL_NAME, LOCK_NAME}
    assert carry_out(case) == ["model-2", INDEX]
    check_whole(case)


def test_no_room_for_a_file(tmp_path: Path) -> None:
    """A real limit, in a process of its own: the file is refused before a byte is written, and nothing is left."""
    program = f"""
import resource, signal
from pathlib import Path
from streamer.errors import StorageError
from streamer.storage.atomic_file import AtomicFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for size, reserved in ((2000, True), (500, False)):
    try:
        with AtomicFile(Path({str(tmp_path / "f")!r}), size) as f:
            f.write(bytes(2000))
    except StorageError as e:
        print(e)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    advice = "File too large; free some space, then run the same command again"
    assert done.stdout.splitlines() == [
        f"{tmp_path}/f: cannot create: {advice}",
        f"{tmp_path}/f: cannot write: {advice}",
    ]
    assert done.stderr == ""
    assert names(tmp_path) == []


HOLD = """
import sys
from pathlib import Path
from streamer.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_held_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as other:
        with pytest.raises(LockedError) as caught:
            take(path)
        assert str(caught.value) == f"{tmp_path}: another run is writing here; wait for it, or choose another output"
        assert caught.value.exit_code == 5
        assert path.exists()
        other.communicate()
        assert other.returncode == 0
    take(path)
    assert names(tmp_path) == []


def test_the_lock_of_a_dead_process_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder(path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait(300)
    assert path.exists()
    take(path)
    assert names(tmp_path) == []


def test_a_file_that_shrinks_does_not_kill_the_process(tmp_path: Path) -> None:
    """Touching a mapped page that is gone would be SIGBUS: seen from outside, the process ends by itself."""
    base = two_shards(tmp_path / "base")
    program = f"""
import os
from streamer.errors import InputChangedError
from streamer.storage.checkpoint import open_checkpoint
checkpoint = open_checkpoint({str(base)!r})
os.truncate({str(base / SHARDS[1])!r}, 0)
try:
    file, info = checkpoint.locate("c")
    bytes(file.view(info))
except InputChangedError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    expected = f"{base / SHARDS[1]}: shrank to 0 B during the run; get the file again\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


@pytest.mark.long
def test_users_run_without_checks_of_buffers_and_get_the_same_bytes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamer", "merge", *map(str, inputs), "--method", "shrink", "--quiet", "-o"]
    for name, checked in (("checked", {"STREAMER_CHECK_BUFFERS": "1"}), ("plain", {})):
        env = {key: value for key, value in os.environ.items() if key != "STREAMER_CHECK_BUFFERS"} | checked
        subprocess.run([*command, str(tmp_path / name)], env=env, check=True)
    assert tree_digest(tmp_path / "checked") == tree_digest(tmp_path / "plain")

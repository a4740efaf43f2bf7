"""Many short runs of the command line, each in a process of its own: forks of one process that has imported everything.

A run can be disturbed: at its n-th system call that changes something on disk, any code can be run inside it, such as a SIGKILL.
"""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import ENV, with_method
from helpers import one_file

CALLS = ("write", "pwrite", "fsync", "rename", "unlink", "ftruncate")

SERVER = """
import errno, gc, importlib, json, os, resource, signal, sys, time
import torch
torch.set_num_threads(1)
import streamer.cli.main, streamer.api.intruders, streamer.api.report, streamer.cli.tables
from streamer.cli.main import run

home, calls = sys.argv[1], sys.argv[2].split(",")
for module in sys.argv[3:]:
    importlib.import_module(module)
streamer.detect_intruder_dimensions(home + "/one", home + "/few", solver="dense")  # runs find its look-ups done
gc.freeze()  # a collection in a run would copy every page of what is imported
real = {name: getattr(os, name) for name in calls}
log = []

def half():
    # The first half of the bytes arrives: what a power cut leaves of a write.
    name, args = log[-1], last[0]
    if name in ("write", "pwrite"):
        real[name](args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])

def watch(name, at, code):
    def call(*args, **kwargs):
        log.append(name)
        last[:] = [args]
        if len(log) == at:
            exec(code)
        return real[name](*args, **kwargs)
    return call

last = [()]
for line in sys.stdin:
    ask = json.loads(line)
    if "cont" in ask:
        pid = ask["cont"]
        os.kill(pid, signal.SIGCONT)
    else:
        pid = os.fork()
    if pid == 0:
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{home}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        code = 99
        try:
            for name in calls:
                setattr(os, name, watch(name, ask["at"], ask["code"]))
            exec(ask["before"])
            code = run(ask["argv"])
            signal.setitimer(signal.ITIMER_REAL, 0)  # a kill after the end is none
        except SystemExit as e:
            code = e.code
        finally:
            for name in calls:
                setattr(os, name, real[name])
            if code == 99:
                import traceback
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            with open(f"{home}/log", "w") as f:
                json.dump(log, f)
            os._exit(code)
    # Only a run that stops itself is asked about: anyone may stop processes on a shared machine, and let them go on.
    _, status = os.waitpid(pid, os.WUNTRACED if "SIGSTOP" in ask.get("code", "") else 0)
    stopped = os.WIFSTOPPED(status)
    print(json.dumps({"pid": pid, "stopped": stopped, "code": 0 if stopped else os.waitstatus_to_exitcode(status)}), flush=True)
os._exit(0)  # at once: taking down what is imported takes a second
"""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code (−N for signal N), what it printed, the calls it made; `stopped` if it only sleeps.

    `err` is without the last line of a command that did its work, which is `last`.
    """

    code: int
    out: str
    err: str
    calls: list[str]
    pid: int
    stopped: bool
    last: str = ""

    @property
    def told(self) -> str:
        """What it printed on stderr, but for notes and what is lost in projection: small ranks lose much."""
        aside = "streamer: note: ", "streamer: warning: lost in projection: "
        return "".join(line for line in self.err.splitlines(True) if not line.startswith(aside))


LAST = re.compile(r"streamer: [a-z]+(?: --dry-run)?: .*\bin \d[^\n]*\n\Z")


class Server:
    """The process that forks.

    Parameters
    ----------
    preload
        A library that is loaded before all others.
    modules
        What it imports besides, so that no run has to.
    """

    def __init__(self, preload: Path | None = None, modules: tuple[str, ...] = ()) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="forks-")
        one_file(Path(self._home.name))
        env = {**ENV, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        if preload is not None:
            env["LD_PRELOAD"] = str(preload)
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, self._home.name, ",".join(CALLS), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            stderr=subprocess.DEVNULL,
        )

    def run(
        self, *argv: object, at: int = 0, code: str = "", before: str = "", as_given: bool = False
    ) -> Outcome:
        """Run `streamer` with these arguments; `code` runs inside before its `at`-th call, `before` at its beginning.

        Without `as_given`, a method is named if they name none; see `with_method`.
        """
        words = [str(arg) for arg in argv] if as_given else with_method(argv)
        return self._ask({"argv": words, "at": at, "code": code, "before": before})

    @property
    def running(self) -> int:
        """The process of the run that is under way."""
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])

    def resume(self, pid: int) -> Outcome:
        """Let a stopped run go on to its end."""
        return self._ask({"cont": pid})

    def _ask(self, question: dict) -> Outcome:
        home = Path(self._home.name)
        (home / "log").unlink(missing_ok=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        calls = json.loads((home / "log").read_text()) if (home / "log").exists() else []
        out, err = ((home / name).read_text() for name in ("out", "err"))
        last = LAST.search(err)
        said = err[: last.start()] if last else err
        return Outcome(
            answer["code"],
            out,
            said,
            calls,
            answer["pid"],
            answer["stopped"],
            last[0] if last else "",
        )

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(300)
        self._process.stdout.close()
        self._home.cleanup()


@functools.cache
def server(*modules: str) -> Server:
    """The one server of a test session that has imported these besides."""
    made = Server(modules=modules)
    atexit.register(made.close)
    return made


MODEL_MODULES = (
    "streamer.api.texts",
    "scipy.special",
    "transformers.models.llama.modeling_llama",
)
"""Modules that only commands with a model import."""


@pytest.fixture(scope="session", name="server")
def model_server() -> Server:
    """The server of commands that run a model."""
    return server(*MODEL_MODULES)


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
TORN = f"half(); {KILL}"
STOP = "os.kill(os.getpid(), signal.SIGSTOP)"


def partials(directory: Path) -> list[str]:
    """Names of half-written files below a directory."""
    return [os.fspath(p) for p in directory.rglob("*.partial")]

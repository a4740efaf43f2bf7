"""Odd surroundings of a command: Python's options, streams, variables, directories; threads as its process has them."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from command_line import ENV, with_method
from forks import server
from learned import make_learned

import streamer
from streamer.errors import UsageError
from streamer.linalg import operators
from streamer.storage.files import available_cores


def run(*argv: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streamer", *with_method(argv)]
    environment = {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        **ENV,
        **variables,
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return helpers.one_file(tmp_path_factory.mktemp("inputs"))


@pytest.mark.long
def test_without_docstrings(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("merge", *inputs, "-o", tmp_path / "out", PYTHONOPTIMIZE="2")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"PYTHONWARNINGS": "error"}, 0, ""),  # torch and transformers warn when they are imported
        (
            {"PYTHONOPTIMIZE": "2"},
            3,
            "; run Python without -OO, which removes docstrings\n",
        ),  # transformers reads its own
    ],
)
def test_transformers_under_options_of_python(
    tmp_path: Path, variables: dict[str, str], code: int, said: str
) -> None:
    home = make_learned(tmp_path)
    texts = [
        "--general",
        home / "general.npy",
        "--task",
        home / "task.npy",
        "--length",
        8,
        "--method",
        "shrink",
    ]
    done = run(
        "evaluate",
        home / "base",
        home / "adapter",
        *texts,
        "-o",
        tmp_path / "e.json",
        "-qq",
        **variables,
    )
    assert (done.returncode, done.stderr.count("\n"), done.stderr.endswith(said)) == (
        code,
        code // 3,
        True,
    ), done.stderr


@pytest.mark.long
def test_a_stdout_of_few_characters(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Paths may have characters that ASCII lacks, and so have some tables."""
    base, adapter = inputs
    named = Path(shutil.copytree(adapter, tmp_path / "ünï±"))
    done = run(
        "mitigate",
        base,
        named,
        "-o",
        tmp_path / "out±",
        "--lambda",
        "0.5",
        PYTHONIOENCODING="ascii",
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert r"out\xb1" in done.stdout


@pytest.mark.long
def test_files_are_in_utf8_whatever_the_locale_says(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = inputs
    named = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    config = json.loads((named / "adapter_config.json").read_bytes())
    (named / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "Zoë"}, ensure_ascii=False), "utf-8"
    )
    (named / "README.md").write_text("# Für alle", "utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for argv in (
        ["merge", base, named, "-o", tmp_path / "out"],
        ["verify", tmp_path / "out", base, named],
    ):
        done = run(*argv, **ascii_only)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize("place", ["BASE", "--output"])
def test_an_empty_argument(inputs: tuple[Path, Path], tmp_path: Path, place: str) -> None:
    """An unset variable of the shell gives one."""
    base, adapter = inputs
    argv = ["inspect", "", adapter] if place == "BASE" else ["merge", base, adapter, "--output="]
    done = server().run(*argv, before=f"os.chdir({str(tmp_path)!r})")
    assert done.code == 2
    assert done.err.startswith("streamer: an argument is empty; ")
    assert os.listdir(tmp_path) == []


def test_a_current_directory_that_is_gone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """MKL would abort."""
    (tmp_path / "gone").mkdir()
    line = (
        f'cd "$0" && rmdir "$0" && exec {shlex.quote(sys.executable)} -m streamer inspect "$1" "$2"'
    )
    environment = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **ENV}
    command = ["sh", "-c", line, tmp_path / "gone", *inputs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 6
    assert "streamer: the current directory: No such file or directory; " in done.stderr


def test_control_characters_of_a_path_are_escaped(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    done = server().run("mitigate", *inputs, "-o", tmp_path / "red\x1b[31m", "--lambda", "0.5")
    assert done.code == 0
    assert r"red\x1b[31m" in done.out
    assert "\x1b" not in done.out + done.err + done.last


def test_a_sample_needs_inputs(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    streamer.merge_with_reduced_intruder_dimensions(*inputs, tmp_path / "out")
    with pytest.raises(UsageError, match="sample: 'all' recomputes matrices from BASE and ADAPTER"):
        streamer.verify_output(tmp_path / "out", sample="all")


SAY = "import os, torch; print(os.environ.get('OMP_WAIT_POLICY'), torch.get_num_threads())"


def told(*argv: str, **env: str) -> list[str]:
    """What a command leaves in its process: the policy, and torch's threads."""
    code = f"import sys; from streamer.cli.main import run; assert run({[*argv, '--quiet']!r}) == 0; {SAY}"
    clean = {
        key: value
        for key, value in ENV.items()
        if key not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1].split()


@pytest.mark.skipif(shutil.which("lscpu") is None, reason="lscpu is not installed")
def test_only_intels_processors_have_long_rows() -> None:
    cpu = subprocess.run(
        ["lscpu"], capture_output=True, text=True, check=True, env={"LC_ALL": "C"}
    ).stdout
    assert operators._long_rows() == (10_000 if "GenuineIntel" in cpu else math.inf)


@pytest.mark.long
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    argv = ["detect", *map(str, job), "-o", str(tmp_path / "f.safetensors")]
    assert told("inspect", *map(str, job)) == ["PASSIVE", str(available_cores())]
    assert told(*argv, OMP_WAIT_POLICY="ACTIVE", OMP_NUM_THREADS="1") == ["ACTIVE", "1"]
    assert told(*argv, "--threads", "1", GOMP_SPINCOUNT="1000", OMP_NUM_THREADS="2") == [
        "None",
        "1",
    ]


ONE_CORE = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"


def test_there_are_no_more_threads_than_cores(job: tuple[Path, Path], tmp_path: Path) -> None:
    """A script may name the cores of a node, of which a job has got fewer."""
    line = ("detect", *job, "-o", tmp_path / "f.safetensors", "--threads", 1000)
    done = server().run(*line, before=ONE_CORE)
    assert done.code == 0
    assert (
        "streamer: note: --threads 1000: this process may use 1 core, so it starts 1\n" in done.err
    )


def test_the_mask_counts() -> None:
    """As under taskset, Slurm or a container's cpuset."""
    assert "1 here" in " ".join(server().run("detect", "--help-all", before=ONE_CORE).out.split())


def test_the_help_says_how_many_threads_there_are() -> None:
    text = " ".join(server().run("detect", "--help-all").out.split())
    assert f"one per core available to this process, {available_cores()} here" in text

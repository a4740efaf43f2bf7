"""Options: what makes no sense, usage and help."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import WRITING, refuse
from forks import server

# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--top-k", "0"],
            "streamer: --top-k: expected a count from 1, or a share in (0, 1] with a decimal point, found 0",
        ),
        (["--top-k", "-3"], "found -3"),
        (["--top-k", "1.5"], "found 1.5"),
        (["--epsilon", "0"], "streamer: --epsilon: expected a number in (0, 1], found 0.0"),
        (["--epsilon", "1.1"], "found 1.1"),
        (["--epsilon", "nan"], "found nan"),
        (["--threads", "0"], "--threads: expected a number from 1, found 0"),
        (["--device", "abacus"], "streamer: --device: expected auto, cpu, cuda or cuda:i, found 'abacus'"),
        (["--device", "cuda:99"], "streamer: --device: cuda:99 is not there; use cpu"),
    ],
)
def test_options_that_make_no_sense(job: tuple[Path, Path], tmp_path: Path, options: list[str], words: str) -> None:
    for command in WRITING:
        for dry in ([], ["--dry-run"]):
            assert words in refuse(command, *job, tmp_path, 2, *options, *dry)


@pytest.mark.parametrize("command", ["merge", "mitigate"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_lambda_is_finite(job: tuple[Path, Path], tmp_path: Path, command: str, value: str) -> None:
    line = refuse(command, *job, tmp_path, 2, f"--lambda={value}")
    assert f"lambda must be a finite number, got {value}" in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["detect", "b", "a"], "the following arguments are required: -o/--output"),
        (["merge", "b", "-o", "x"], "the following arguments are required: ADAPTER"),
        (
            ["detect", "b", "a", "-o", "x", "--top-k", "some"],
            "argument --top-k: expected a count like 10 or a share like 0.1, found 'some'",
        ),
        (["merge", "b", "a", "-o", "x", "--lambda", "much"], "argument --lambda: invalid float value: 'much'"),
        (["merge", "b", "a", "-o", "x", "--method", "magic"], "argument --method: invalid choice: 'magic'"),
        (["detect", "b", "a", "-o", "x", "--lambda", "1"], "unrecognized arguments: --lambda 1"),
    ],
)
def test_usage(argv: list[str], words: str) -> None:
    done = server().run(*argv)
    assert (done.code, done.out, done.calls) == (2, "", [])
    first, *more, last = done.err.splitlines()
    assert words in last
    assert re.match(r"streamer( \w+)?: error: ", last)
    assert first.startswith("usage: streamer")
    assert all(line.startswith("  ") for line in more), done.err
    assert "\\n" not in done.err


def test_usage_quotes_what_it_was_given_in_one_line() -> None:
    done = server().run("fly\x1b[2J\nhigh")
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("streamer: error: argument COMMAND: invalid choice: ")
    assert "\x1b" not in done.err


@pytest.mark.parametrize("command", ["inspect", "detect", "mitigate", "merge", "report", "demo"])
def test_help_says_what_exit_codes_mean(command: str) -> None:
    done = server().run(command, "--help")
    assert (done.code, done.told) == (0, "")
    for words in ("2 usage", "5 locked by another run", "8 input changed during the run", "128+N stopped by signal N",
                  "--json", "--quiet"):  # fmt: skip
        assert words in done.out
    assert command in server().run("--help").out

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
        (["--threads", "0"], "--threads: expected a number from 1 to 1024, found 0"),
        (["--threads", "1025"], "found 1025"),
        (["--device", "abacus"], "streamer: --device: expected auto, cpu, cuda or cuda:i, found 'abacus'"),
        (["--device", "cuda:99"], "streamer: --device: cuda:99 is not available; use cpu"),
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
        (["fly"], "COMMAND: expected one of inspect, detect, "),
        (["mrege", "b", "a", "-o", "x"], "found 'mrege'; did you mean merge?"),
        (["--verison"], "unknown option '--verison'; did you mean --version?"),
        (["merge", "b", "a", "--ouput", "x"], "unknown option '--ouput'; did you mean --output?"),
        (
            ["merge", "b", "a", "-o", "x", "--lambda", "75%"],
            "--lambda: expected a number like 0.75, found '75%'; did you mean 0.75?",
        ),
        (
            ["merge", "b", "a", "-o", "x", "--lambda", "0,75"],
            "--lambda: expected a number like 0.75, found '0,75'; did you mean 0.75?",
        ),
        (
            ["fit", "b", "a", "-o", "x", "--keep", "0.9,85%"],
            "--keep: expected a number like 0.75, found '85%'; did you mean 0.85?",
        ),
        (["demo", "--lambda=75 %"], "--lambda: expected a number like 0.75, found '75 %'; did you mean 0.75?"),
        (["detect", "b", "a"], "the following arguments are required: -o/--output"),
        (["merge", "b", "-o", "x"], "the following arguments are required: ADAPTER"),
        (
            ["detect", "b", "a", "-o", "x", "--top-k", "some"],
            "--top-k: expected a count like 10 or a share like 0.1, found 'some'; see `streamer detect --help`",
        ),
        (
            ["merge", "b", "a", "-o", "x", "--lambda", "much"],
            "--lambda: expected a number like 0.75, found 'much'; see `streamer merge",
        ),
        (
            ["merge", "b", "a", "-o", "x", "--method", "paperr"],
            "regmean, nullspace, found 'paperr'; did you mean paper?",
        ),
        (["detect", "b", "a", "-o", "x", "--lambda", "1"], "unknown option '--lambda'; see `streamer detect --help`"),
        (["demo", "more"], "streamer: unexpected argument 'more'; see `streamer demo --help`"),
        (["merge", "b", "a", "-m", "paper", "-o", "x"], "streamer: unknown option '-m'; see `streamer merge --help`"),
        (["detect", "b", "a", "-o", "x", "--threads", "two"], "--threads: expected a whole number, found 'two'; see"),
    ],
)
def test_usage(argv: list[str], words: str) -> None:
    done = server().run(*argv)
    assert (done.code, done.out, done.calls) == (2, "", [])
    (line,) = done.err.splitlines()
    assert words in line
    assert re.fullmatch(r"streamer: .*(; see `streamer( \w+)? --help`|; did you mean \S+\?)", line)
    assert len(line) <= 300


@pytest.mark.parametrize(("argv", "words"), [
    (["detect", "b", "a", "-o", "x", "--part", "1/2"], "--part was removed: use --workers N, or --executor"),
    (["demo", "--keep=d"], "--keep was removed: use -o DIR"),
])  # fmt: skip
def test_a_removed_option_names_what_to_use(argv: list[str], words: str) -> None:
    done = server().run(*argv)
    assert (done.code, done.out, done.err) == (2, "", f"streamer: {words}\n")


def test_usage_quotes_what_it_was_given_in_one_line() -> None:
    done = server().run("fly\x1b[2J\nhigh")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith("streamer: COMMAND: expected one of ")
    assert "\x1b" not in line


@pytest.mark.parametrize("command", ["inspect", "detect", "mitigate", "merge", "report", "demo"])
def test_help_says_what_exit_codes_mean(command: str) -> None:
    done = server().run(command, "--help")
    assert (done.code, done.told) == (0, "")
    for words in ("2 usage", "5 locked by another run", "8 input changed during the run", "128+N stopped by signal N",
                  "--json", "--quiet"):  # fmt: skip
        assert words in done.out
    assert command in server().run("--help").out

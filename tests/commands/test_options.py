"""Options: what makes no sense, usage and help, completion, the man page, abbreviations."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from arguments import subparsers
from command_line import ENV
from commands import WRITING, refuse
from forks import server
from paths import TOOLS

from streamer.cli.parser import COMMANDS

# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--top-k", "0"],
            "streamer: --top-k: expected a count from 1, or a share in (0, 1] with a decimal point, found 0",
        ),
        (["--epsilon", "0"], "streamer: --epsilon: expected a number in (0, 1], found 0.0"),
        (["--threads", "0"], "--threads: expected a number from 1 to 1024, found 0"),
        (
            ["--device", "abacus"],
            "streamer: --device: expected auto, cpu, cuda or cuda:i, found 'abacus'",
        ),
        (["--device", "cuda:99"], "streamer: --device: cuda:99 is not available; use cpu"),
    ],
)
def test_options_that_make_no_sense(
    job: tuple[Path, Path], tmp_path: Path, options: list[str], words: str
) -> None:
    for command in WRITING:
        for dry in ([], ["--dry-run"]):
            assert words in refuse(command, *job, tmp_path, 2, *options, *dry)


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
            ["repair", "b", "a", "-o", "x", "--mu", "0.9,85%"],
            "--mu: expected a number like 0.75, found '85%'; did you mean 0.85?",
        ),
        (
            ["merge", "b", "a", "-o", "x", "--lambda=75 %"],
            "--lambda: expected a number like 0.75, found '75 %'; did you mean 0.75?",
        ),
        (["detect", "b", "a"], "the following arguments are required: -o/--output"),
        (["merge", "b", "-o", "x"], "the following arguments are required: ADAPTER"),
        (
            ["detect", "b", "a", "-o", "x", "--top-k", "some"],
            "--top-k: expected a count like 10 or a share like 0.1, found 'some'; see `streamer detect --help-all`",
        ),
        (
            ["merge", "b", "a", "-o", "x", "--lambda", "much"],
            "--lambda: expected a number like 0.75, found 'much'; see `streamer merge",
        ),
        (
            ["merge", "b", "a", "-o", "x", "--method", "paperr"],
            "regmean, nullspace, found 'paperr'; did you mean paper?",
        ),
        (
            ["detect", "b", "a", "-o", "x", "--lambda", "1"],
            "unknown option '--lambda'; see `streamer detect --help-all`",
        ),
        (["demo", "more"], "streamer: unexpected argument 'more'; see `streamer demo --help-all`"),
        (
            ["merge", "b", "a", "-m", "paper", "-o", "x"],
            "streamer: unknown option '-m'; see `streamer merge --help-all`",
        ),
        (
            ["detect", "b", "a", "-o", "x", "--threads", "two"],
            "--threads: expected a whole number, found 'two'; see",
        ),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(argv: list[str], words: str) -> None:
    done = server().run(*argv)
    assert (done.code, done.out, done.calls) == (2, "", [])
    (line,) = done.err.splitlines()
    assert words in line
    assert re.fullmatch(
        r"streamer: .*(; see `streamer( \w+)? --help-all`|; did you mean \S+\?)", line
    )
    assert len(line) <= 300


def test_usage_quotes_what_it_was_given_in_one_line() -> None:
    done = server().run("fly\x1b[2J\nhigh")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith("streamer: COMMAND: expected one of ")
    assert "\x1b" not in line


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_short_and_says_where_all_of_it_is(command: str) -> None:
    before = "os.environ['COLUMNS'] = '80'"
    short, full = (
        server().run(*command.split(), option, before=before) for option in ("--help", "--help-all")
    )
    for done in (short, full):
        assert (done.code, done.told) == (0, "")
        assert not [line for line in done.out.splitlines() if len(line) > 80]
        for words in ("--help-all", *(["--json", "--quiet"] if command else COMMANDS)):
            assert words in done.out
    assert len(short.out.splitlines()) <= 45
    for words in (
        "2 usage",
        "5 locked by another run",
        "8 input changed during the run",
        "128+N stopped by signal N",
    ):
        assert words in full.out
        assert words not in short.out
    options = (
        {option for action in subparsers()[command]._actions for option in action.option_strings}
        if command
        else set()
    )
    assert all(option in full.out for option in options)


# The parser -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_completion_script(shell: str, tmp_path: Path) -> None:
    done = server().run("--print-completion", shell)
    assert (done.code, done.err) == (0, "")
    assert "mitigate" in done.out
    assert "to-lora" in done.out
    if shell == "bash":
        script = tmp_path / "streamer.bash"
        script.write_text(done.out)
        (tmp_path / "adapter-dir").mkdir()
        ask = (
            f"source {script}; cd {tmp_path}; COMP_WORDS=({{words}}); COMP_CWORD={{at}}; "
            "$(complete -p streamer | sed 's/.*-F \\([^ ]*\\).*/\\1/') streamer; echo ${{COMPREPLY[@]}}"
        )

        def complete(*words: str) -> list[str]:
            text = ask.format(words=" ".join(words), at=len(words) - 1)
            return subprocess.run(
                ["bash", "-c", text], capture_output=True, text=True, check=True
            ).stdout.split()

        assert complete("streamer", "mit") == ["mitigate"]
        assert "--lambda" in complete("streamer", "merge", "--l")
        assert "adapter-dir" in complete("streamer", "mitigate", "adapter-")


def test_completion_without_its_library() -> None:
    code = "import sys; sys.modules['shtab'] = None; from streamer.cli.main import run; run(['--print-completion', 'bash'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENV, check=False
    )
    assert done.returncode == 2
    assert (
        "needs shtab, which is not installed: pip install 'intruder-streamer[completion]'"
        in done.stderr.splitlines()[-1]
    )


def test_abbreviations_are_not_taken() -> None:
    """A new option would make them mean something else."""
    assert server().run("merge", "b", "a", "-o", "x", "--lam", "0.5").code == 2


def test_a_man_page(tmp_path: Path) -> None:
    pytest.importorskip("argparse_manpage")
    tool = TOOLS / "make_man_page.py"
    page = tmp_path / "streamer.1"
    subprocess.run([sys.executable, tool, "-o", page], check=True, env=ENV)
    text = page.read_text()
    for words in (
        "streamer merge",
        r"\-\-to\-lora",
        "exit codes",
        "streamer report findings.safetensors",
    ):
        assert words in text, words
    if shutil.which("groff"):
        done = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", page], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        assert "allow a lambda outside" in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", ["mitigate", "merge"])
@pytest.mark.parametrize("options", [(), ("--lambda", "0.5"), ("--to-lora", "4")])
def test_without_a_method_each_is_named_and_nothing_is_written(
    command: str, options: tuple[str, ...], job: tuple[Path, Path], tmp_path: Path
) -> None:
    """On the command line, where the default would be the one that usually changes nothing."""
    if command == "merge":
        options = tuple(word for word in options if word not in ("--to-lora", "4"))
    done = server().run(command, *job, "-o", tmp_path / "out", *options, as_given=True)
    assert (done.code, done.out, done.calls) == (2, "", [])
    first, *lines = done.err.splitlines()
    assert (
        first
        == f"streamer: --method: {command} needs one; these are the choices, with what each kept and left"
    )
    for words in (
        "streamer repair",
        "--method shrink",
        "--map",
        "--method paper",
        "--coefficients",
        "--lambda 1",
    ):
        assert any(line.strip().startswith(words) for line in lines), words
    assert (
        server().run(command, *job, "-o", tmp_path / "out", "--lambda", 1, as_given=True).code == 0
    )


def test_only_commands_that_divide_their_work_have_workers(tmp_path: Path) -> None:
    done = server().run("repair", "b", "a", "-o", tmp_path / "out", "--workers", 2)
    assert done.code == 2
    assert "'--workers', which only detect and merge have; other commands use --threads" in done.err

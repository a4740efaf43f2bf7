"""What a person sees: commands on real terminals of several widths, and in a log; the last screen has no bar and no line that wraps."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import terminal
from command_line import ENV, with_method
from forks import server
from helpers import intruding_factors, planted, power_law, write_adapter, write_sharded

WITHOUT_TRANSFORMERS = "sys.modules['transformers'] = None"
"""With which the demo shrinks, in a second."""

BAR = re.compile(r"\d+/\d+ (matrices|tensors|files)(  *\d+%)?\|[█▉▊▋▌▍▎▏ ]+\| \d\d:\d\d<")
WIDTHS = (40, 80, 200)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return helpers.three_shards(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of 60 matrices in 15 layers, and an adapter that brings an intruder into each q_proj, and next to nothing into the others."""
    home = tmp_path_factory.mktemp("many")
    factors = {}
    tensors = {}
    for layer in range(15):
        for j, name in enumerate(
            ("mlp.down_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj")
        ):
            module = f"model.layers.{layer}.{name}"
            seed = 4 * layer + j
            if name == "self_attn.q_proj":
                tensors[f"{module}.weight"], factors[module] = planted(32, 24, 2, seed)
            else:
                tensors[f"{module}.weight"] = power_law(32, 24, seed=seed).float()
                factors[module] = intruding_factors(32, 24, 2, seed=seed, sigma=0.01)
    return write_sharded(home / "base", [tensors]), write_adapter(home / "adapter", factors, 2)


@pytest.fixture(scope="module")
def findings(many: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("findings") / "f.safetensors"
    assert server().run("detect", *many, "-o", out).code == 0
    return out


@pytest.mark.long
@pytest.mark.parametrize("columns", WIDTHS)
def test_the_last_screen_of_every_command(
    job: tuple[Path, Path], columns: int, tmp_path: Path
) -> None:
    """The result, clean; one line at the end; and not a trace of the bar that was there."""
    runs = {
        "demo": ["demo"],
        "inspect": ["inspect", *job],
        "detect": ["detect", *job, "-o", tmp_path / "f.safetensors"],
        "mitigate": ["mitigate", *job, "-o", tmp_path / "a", "--lambda", "0.5"],
        "merge": ["merge", *job, "-o", tmp_path / "m"],
    }
    for command, argv in runs.items():
        shown = terminal.show(columns, *argv, code=WITHOUT_TRANSFORMERS)
        assert shown.code == 0, shown.last
        bars = [line for line in shown.during if BAR.search(line)]
        assert bars or command == "inspect", (command, shown.during)
        assert all(len(line) < columns for line in bars)
        assert not [line for line in shown.last if BAR.search(line) or "%|" in line]
        assert not any(re.search(r", *$", line) for line in bars)
        # A line as long as the terminal is wide might have wrapped; only a path, which stays whole, is longer.
        wide = [
            line for line in shown.last if len(line) >= columns and str(tmp_path)[:10] not in line
        ]
        assert all(len(line) == columns for line in wide), wide
        # What a bar overwrites ends with a bare carriage return; what is left are lines of results.
        result = re.sub(r"[^\r\n]*\r(?!\n)|\x1b\[K", "", shown.drawn.decode()).replace("\r\n", "\n")
        # Words stay whole: paths, and names of tensors.
        long = [
            line
            for line in result.split("\n")
            if len(line) > columns and "/" not in line and " " in line.strip()
        ]
        assert not long, long
        assert re.fullmatch(rf"streamer: {command}: done in \d.* s", shown.last[-1]), shown.last[-1]


def test_the_bar_names_its_unit_and_gives_up_the_name_first(
    many: tuple[Path, Path], tmp_path: Path
) -> None:
    for columns in (*WIDTHS, 36):
        shown = terminal.show(columns, "detect", *many, "-o", tmp_path / f"{columns}.safetensors")
        assert shown.code == 0, shown.last
        bars = [line for line in shown.during if re.match(r"detect +\d+/60 matrices", line)]
        assert bars
        assert all(("|" in line) == (columns > 36) for line in bars)
        assert all(("matrix/s" in line) == (columns >= 80) for line in bars)
        assert all(bool(re.search(r"_proj|…\S", line)) == (columns >= 80) for line in bars), bars
        assert all(re.search(r"\d\d:\d\d<(\?|\d\d:\d\d)(,|$)", line) for line in bars), bars
        assert all(
            len(line) <= columns - 2 for line in bars
        )  # so that a terminal's ^C does not wrap


def test_several_adapters_are_named(tmp_path: Path) -> None:
    base, adapter = helpers.three_shards(tmp_path)
    (tmp_path / "several").mkdir()
    for name in ("poems", "legal"):
        os.symlink(adapter, tmp_path / "several" / name)
    shown = terminal.show(120, "detect", base, tmp_path / "several", "-o", tmp_path / "found")
    assert shown.code == 0
    assert [
        line
        for line in shown.during
        if re.search(r"detect +\d+/18 .*, (poems|legal): \S+_proj$", line)
    ]
    done = server().run("detect", base, tmp_path / "several", "-o", tmp_path / "again")
    assert done.code == 0, done.err
    head, _, *rows = (line.split() for line in done.out.splitlines()[:5])
    assert head == ["adapter", "matrices", "with", "any", "intruders", "certified"]
    assert [row[:2] for row in rows] == [["legal", "9"], ["poems", "9"], ["all", "together"]]
    shown = f"\n--all shows each adapter's matrices\n\nwrote {tmp_path / 'again'}\n\nnext: streamer repair {base} ADAPTER "
    assert shown in done.out
    full = server().run("merge", base, tmp_path / "several", "-o", tmp_path / "merged", "--all")
    assert full.code == 0, full.err
    assert full.out.count("model.layers.") == 18
    assert full.out.count("Frobenius norm of the delta") == 1, "a legend is shown once"
    short = server().run("merge", base, tmp_path / "several", "-o", tmp_path / "merged2")
    assert short.code == 0, short.err
    assert "model.layers." not in short.out
    assert short.out.split()[:2] == ["adapter", "matrices"]


def test_a_probe_shows_progress(job: tuple[Path, Path], tmp_path: Path) -> None:
    shown = terminal.show(80, "merge", *job, "-o", tmp_path / "m", "--dry-run")
    assert shown.code == 0, shown.last
    assert [line for line in shown.during if re.match(r"probe: \w.* \d\d:\d\d$", line)], (
        shown.during
    )


@pytest.mark.parametrize("mode", ["none", "plain", "bar"])
def test_progress_as_asked_for(job: tuple[Path, Path], mode: str, tmp_path: Path) -> None:
    """A job of a second has nothing to say in a log but its last line; a bar can be forced into one."""
    done = server().run("detect", *job, "-o", tmp_path / "f.safetensors", "--progress", mode)
    assert done.code == 0
    assert bool(BAR.search(done.err)) == (mode == "bar")
    assert mode == "bar" or done.err == ""
    assert re.fullmatch(r"streamer: detect: done in [\d.]+ s\n", done.last)
    shown = terminal.show(80, "detect", *job, "-o", tmp_path / "t.safetensors", "--progress", mode)
    assert shown.code == 0, shown.last
    assert bool([line for line in shown.during if BAR.search(line)]) == (mode == "bar")


def test_a_dumb_terminal_has_no_bar(job: tuple[Path, Path], tmp_path: Path) -> None:
    shown = terminal.show(
        80, "detect", *job, "-o", tmp_path / "f.safetensors", env={"TERM": "dumb"}
    )
    assert shown.code == 0, shown.last
    assert not [line for line in shown.during if BAR.search(line)]
    assert b"\x1b" not in shown.drawn


def test_a_log_reads_well(tmp_path: Path) -> None:
    """With stderr in a file each command leaves whole lines that begin alike, and the last says what was done."""
    home = tmp_path / "demo"
    found = tmp_path / "f.safetensors"
    base = home / "base"
    adapter = home / "adapter"
    runs = [
        ["demo", "-o", home],
        ["inspect", base, adapter],
        ["detect", base, adapter, "-o", found],
        ["report", found],
        ["mitigate", base, adapter, "-o", tmp_path / "a", "--findings", found],
        ["merge", base, adapter, "-o", tmp_path / "m", "--findings", found],
        ["merge", base, adapter, "-o", tmp_path / "m", "--findings", found],
    ]
    for argv in runs:
        done = server().run(*argv, before=WITHOUT_TRANSFORMERS)
        assert done.code == 0, done.err
        *notes, last = (done.err + done.last).splitlines()
        assert all(re.fullmatch(r"streamer: (note|warning): .{20,300}", line) for line in notes), (
            notes
        )
        assert re.fullmatch(rf"streamer: {argv[0]}: .*in \d.* s", last), last


# Calls in Python ------------------------------------------------------------------------------------------------------

CALL = """
import streamer
def stop(event):
    if event.items == 3:
        raise KeyboardInterrupt
try:
    streamer.detect_intruder_dimensions({base!r}, {adapter!r}, progress={progress}, on_event={on_event})
except KeyboardInterrupt:
    pass
print("after")
"""

WARNED = """
from streamer.events import Event
from streamer.api.calls import watched
from streamer.options import Watched
with watched(Watched(progress=True)) as monitor:
    monitor.emit(Event("evaluate", "a.weight", 0, 80, 0, 8))
    monitor.emit(Event("detect", "a.weight", 0, 4, 0, 4))
    monitor.emit(Event("warning", "odd"))
    monitor.emit(Event("detect", "b.weight", 1, 4, 1, 4))
    monitor.emit(Event("detect", "", 4, 4, 4, 4))
"""


def called(job: tuple[Path, Path], progress: bool | None, on_event: str = "None") -> terminal.Shown:
    code = CALL.format(base=str(job[0]), adapter=str(job[1]), progress=progress, on_event=on_event)
    return terminal.show(100, "--version", code=code)


def test_a_call_draws_bars_that_stay(job: tuple[Path, Path]) -> None:
    """An interrupted call leaves its bar where it was; what is printed next is on a line of its own."""
    shown = called(job, True)
    assert re.fullmatch(r"detect 9/9 matrices 100%\|█+\| 00:0\d<00:00, +\S+matrix/s", shown.last[0])
    assert shown.last[1] == "after"
    shown = called(job, True, "stop")
    assert re.match(r"detect 3/9 matrices +\d\d%\|█", shown.last[0])
    assert shown.last[1] == "after"


def test_an_iteration_draws_a_bar(job: tuple[Path, Path]) -> None:
    code = f"import streamer; print(len(list(streamer.iter_merged({str(job[0])!r}, {str(job[1])!r}, method='shrink', progress=True))))"
    bar, count = terminal.show(100, "--version", code=code).last[:2]
    assert re.match(rf"write {count}/{count} tensors 100%\|█+\| 00:0\d<00:00, ", bar)


@pytest.mark.parametrize("progress", [False, None])
def test_a_call_outside_of_a_notebook_draws_no_bar_unasked(
    job: tuple[Path, Path], progress: bool | None
) -> None:
    assert called(job, progress).last[0] == "after"


def test_warnings_of_a_call_stand_between_its_bars() -> None:
    """The bar of a stage goes when another begins within it."""
    shown = terminal.show(100, "--version", code=WARNED)
    assert [line for line in shown.during if line.startswith("evaluate 0/8 layers   0%|")]
    assert not [line for line in shown.last if line.startswith("evaluate")]
    assert re.fullmatch(r"<string>:\d+: StreamerWarning: odd", shown.last[0])
    assert re.match(r"detect 4/4 matrices 100%\|█", shown.last[-2])
    assert [line for line in shown.during if line.startswith("detect 0/4 matrices   0%|")]


# Many matrices --------------------------------------------------------------------------------------------------------


def test_many_matrices_end_with_ten_and_totals(
    many: tuple[Path, Path], findings: Path, tmp_path: Path
) -> None:
    """In a pipe as on a terminal; the ten are those whose intruders have most of the delta."""
    runs = [
        ["report", findings],
        ["detect", *many, "-o", tmp_path / "f.safetensors"],
        ["mitigate", *many, "-o", tmp_path / "a", "--findings", findings],
        ["merge", *many, "-o", tmp_path / "m", "--findings", findings],
    ]
    for argv in runs:
        done = server().run(*argv)
        assert done.code == 0, done.err
        rows = [line for line in done.out.splitlines() if line.startswith("model.layers.")]
        assert len(rows) == 10
        assert all("q_proj.weight " in row for row in rows)  # in full: scripts may look for it
        assert re.search(
            r"^the 10 with the (most energy|largest change), of 60 matrices; --all shows every one$",
            done.out,
            re.M,
        )
    every = server().run("report", findings, "--all")
    assert every.code == 0, every.err
    rows = [line.split()[0] for line in every.out.splitlines() if line.startswith("model.layers.")]
    inside = [
        f"{name}.weight"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    assert rows == [f"model.layers.{layer}.{name}" for layer in range(15) for name in inside]


def test_inspect_puts_layers_together(many: tuple[Path, Path]) -> None:
    short, every = (server().run("inspect", *many, *options) for options in ((), ("--all",)))
    assert (short.code, every.code) == (0, 0), short.err + every.err
    rows = [line.split() for line in short.out.splitlines() if line.startswith("model.layers.")]
    assert [row[:3] for row in rows] == [
        [f"model.layers.*.{name}.weight", "15", "32x24"]
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    assert sum(line.startswith("model.layers.") for line in every.out.splitlines()) == 60


def test_inspect_says_that_an_adapter_was_trained_on_4_bits(
    many: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = many
    assert "4 bits" not in server().run("inspect", *many).out
    shutil.copytree(adapter, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"base_model_name_or_path": "unsloth/some-bnb-4bit"}))
    done = server().run("inspect", base, tmp_path / "a")
    assert "trained on weights in 4 bits (unsloth/some-bnb-4bit); on plain weights" in done.out


def test_every_column_is_explained_or_says_it_itself(findings: Path) -> None:
    plain = {"matrix"}
    done = server().run("report", findings)
    assert done.code == 0, done.err
    head = re.split(r"  +", done.out.splitlines()[0].strip())
    legend = {re.split(r"  +", line)[0] for line in done.out.split("\n\n")[1].splitlines()}
    assert set(head) - plain == legend


# Streams that are not there -------------------------------------------------------------------------------------------

SHELL = 'exec "$0" -m streamer "$@" '


def closed(streams: str, *argv: object) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f"{SHELL}{streams}", sys.executable, *with_method(argv)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)


@pytest.mark.long
def test_a_closed_stdout(job: tuple[Path, Path], findings: Path, tmp_path: Path) -> None:
    done = closed(">&-", "report", findings)
    assert done.returncode == 6
    assert done.stderr == (
        "streamer: stdout: is closed, and the result goes there; redirect it to a file or /dev/null, or pass --quiet\n"
    )
    out = tmp_path / "m"
    assert closed(">&-", "merge", *job, "-o", out).returncode == 6
    assert not out.exists()
    done = closed(">&-", "merge", *job, "-o", out, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    expected = tmp_path / "expected"
    assert server().run("merge", *job, "-o", expected).code == 0
    # Nothing was printed into a file that got number 1; the record's norms depend on the number of threads.
    digests = [
        {k: v for k, v in helpers.tree_digest(d).items() if k != "streamer.json"}
        for d in (out, expected)
    ]
    assert digests[0] == digests[1]


@pytest.mark.long
@pytest.mark.parametrize(
    ("streams", "words"),
    [(">/dev/full", "No space left on device"), ("1</dev/null", "Bad file descriptor")],
)
def test_a_stdout_that_takes_nothing(findings: Path, streams: str, words: str) -> None:
    for argv in (["report", findings], ["--help"]):
        done = closed(streams, *argv)
        assert done.returncode == 6
        assert re.fullmatch(rf"streamer: stdout: {words}; [^\n]*\n", done.stderr), done.stderr


@pytest.mark.long
@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&- <&-"])
def test_a_stderr_that_takes_nothing_ends_no_job(
    job: tuple[Path, Path], streams: str, tmp_path: Path
) -> None:
    done = closed(streams, "detect", *job, "-o", tmp_path / "f.safetensors", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert '"matrices"' in done.stdout


def test_a_reader_of_stderr_that_leaves_ends_no_job(job: tuple[Path, Path], tmp_path: Path) -> None:
    gone = "r, w = os.pipe(); os.close(r); os.dup2(w, 2)"
    done = server().run(
        "detect", *job, "-o", tmp_path / "f.safetensors", "--progress", "bar", before=gone
    )
    assert done.code == 0
    assert (tmp_path / "f.safetensors").exists()

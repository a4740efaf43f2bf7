"""The errors: also those that Python has a word for, one line each, whole after a process boundary; sizes, lists and packages in them."""

import copy
import errno
import pickle
from pathlib import Path

import helpers
import numpy
import pytest

import streamer
from streamer import errors
from streamer.packages import require_package
from streamer.units import format_size, format_sizes, listed, parse_size, quoted

ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.StreamerError)
]


def made(kind: type[errors.StreamerError]) -> errors.StreamerError:
    if kind is errors.Interrupted:
        return errors.Interrupted(15)
    if kind in (errors.MissingInputError, errors.MissingPackageError, errors.OutputExistsError):
        return kind("some/where: no such file; check the path", "some/where")
    if kind is errors.VerificationError:
        return errors.VerificationError(
            "some/where: expected one thing, found another", {"differences": []}
        )
    return kind("some/where: wanted one thing, found another; do this")


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_after_a_process_boundary(kind: type[errors.StreamerError]) -> None:
    error = made(kind)
    assert (
        str(error) == error.args[0] == f"{error}"
    )  # not `[Errno 2] …` as of an OSError, nor quoted as of a KeyError
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert (str(again), again.args, again.exit_code) == (
            str(error),
            error.args,
            error.exit_code,
        )
        for name in ("errno", "strerror", "filename", "name", "verification"):
            assert getattr(again, name, None) == getattr(error, name, None)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.UsageError, ValueError),
        (errors.UnknownNameError, KeyError),
        (errors.MissingPackageError, ImportError),
        (errors.MissingInputError, FileNotFoundError),
        (errors.FormatError, ValueError),
        (errors.UnsupportedError, ValueError),
        (errors.MismatchError, ValueError),
        (errors.OutputExistsError, FileExistsError),
        (errors.NumericError, ArithmeticError),
    ],
)
def test_errors_are_also_pythons_own_kinds(
    kind: type[errors.StreamerError], builtin: type[Exception]
) -> None:
    assert issubclass(kind, builtin)


@pytest.mark.parametrize("wrong", ["base", "adapter", "findings"])
def test_a_missing_input_is_a_file_not_found(
    job: tuple[Path, Path], tmp_path: Path, wrong: str
) -> None:
    paths = {"base": job[0], "adapter": job[1], "findings": tmp_path / "f"} | {
        wrong: tmp_path / "not there"
    }
    with pytest.raises(FileNotFoundError) as e:
        streamer.reduce_intruder_dimension(
            paths["base"],
            paths["adapter"],
            tmp_path / "out",
            findings=paths["findings"] if wrong == "findings" else None,
        )
    assert isinstance(e.value, errors.InputError)
    assert (e.value.errno, e.value.exit_code) == (errno.ENOENT, 3)
    assert str(tmp_path / "not there") in str(e.value.filename)
    assert str(e.value).startswith(str(tmp_path / "not there"))
    assert not (tmp_path / "out").exists()


def test_an_output_that_stands_is_a_file_that_exists(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "f.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not findings") as e:
        streamer.detect_intruder_dimensions(*job, tmp_path / "f.safetensors")
    assert isinstance(e.value, errors.OutputError)
    assert (e.value.filename, e.value.exit_code) == (str(tmp_path / "f.safetensors"), 4)


def test_a_long_message_keeps_its_beginning_and_its_advice() -> None:
    text = f"some/where: {'x' * 5000}; do this"
    said = str(errors.StreamerError(text))
    assert len(said) == errors.LONGEST_MESSAGE + len(" … ")
    assert said.startswith("some/where: xxx")
    assert said.endswith("xxx; do this")
    assert said[-errors.AT_THE_END :] == text[-errors.AT_THE_END :]


def test_a_message_is_one_line() -> None:
    assert str(errors.StreamerError("a\nb\x1b[31m\u2028c")) == "a\\nb\\x1b[31m\\u2028c"


def test_a_wrong_base_is_told_in_one_line_of_some_hundred_characters(
    tmp_path: Path, monkeypatch
) -> None:
    """However many modules an adapter has: the first one or two, as their names have room, and how many more."""
    monkeypatch.chdir(tmp_path)
    base = helpers.write_sharded(Path("base"), [{"a.q.weight": helpers.power_law(12, 8)}])
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(200)]
    adapter = helpers.write_adapter(
        Path("adapter"), {m: helpers.intruding_factors(12, 8, 2) for m in modules}, r=2
    )
    with pytest.raises(errors.MismatchError) as e:
        streamer.detect_intruder_dimensions(base, adapter)
    said = str(e.value)
    assert len(said) <= 300  # with paths of a word each
    assert said.endswith("; and 199 more; is this the base that the adapter was trained on?")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1K", 1024),
        ("600M", 600 << 20),
        ("600m", 600 << 20),
        ("4G", 4 << 30),
        ("4 GiB", 4 << 30),
        ("1.5GB", 3 << 29),
        ("2T", 2 << 40),
        ("10B", 10),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "4X", "four", "1e9", "4GG", "0x10"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^expected a size like 600M or 4G, found "):
        parse_size(text)


def test_sizes_are_written_as_in_tables() -> None:
    sizes = {
        0: "0 B",
        999: "999 B",
        1000: "1.0 kB",
        1 << 20: "1.0 MB",
        16_000_000_000: "16.0 GB",
        3 * 10**12: "3.00 TB",
    }
    assert {n: format_size(n) for n in sizes} == sizes
    assert format_sizes(16 * 10**9, 16 * 10**9 - 1) == ("16000000000 B", "15999999999 B")


def test_long_lists_of_names_are_shortened() -> None:
    assert listed([]) == ""
    assert listed("abc") == "a, b, c"
    assert listed("abcd") == "a, b, c and 1 more"
    assert listed("abcd", 2, "; ") == "a; b; and 2 more"
    assert len(quoted("x" * 10_000)) == 101


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "no_such_package",
            r"it needs numpy 999\.1, which is not installed; pip install 'intruder-streamer\[them\]'",
        ),
        (
            "numpy",
            rf"it needs numpy 999\.1, found {numpy.__version__}; pip install -U 'intruder-streamer\[them\]'",
        ),
    ],
)
def test_a_missing_or_old_one_is_named(name: str, words: str) -> None:
    with pytest.raises(errors.MissingPackageError, match=words):
        require_package(name, (999, 1), "it needs numpy 999.1", "them")

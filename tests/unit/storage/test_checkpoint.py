"""A checkpoint's tensors: which files make it, views, samples, identity; shards that shrink or change, and reads that go wrong."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults import failing
from helpers import view
from safetensors.torch import save_file
from two_shards import MODES, SHARDS, refusal, two_shards

from streamer import errors
from streamer.storage.atomic_file import gather
from streamer.storage.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    IOMode,
    TensorFile,
    check_shard_name,
    open_checkpoint,
    read_json_object,
)
from streamer.storage.local_source import LocalSource


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return two_shards(tmp_path / "base")


@pytest.mark.parametrize("io", MODES)
def test_shards(base: Path, io: IOMode) -> None:
    checkpoint = open_checkpoint(base, io)
    assert checkpoint.warnings == ()
    assert checkpoint.directory == base
    assert tuple(checkpoint.files) == SHARDS
    assert checkpoint.weight_map == {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}
    assert checkpoint.data_bytes == 24 + 40 + 16000
    assert checkpoint.info("a").shape == (2, 3)
    assert bytes(view(checkpoint, "c")) == torch.arange(4000, dtype=torch.int32).numpy().tobytes()
    assert bytes(view(checkpoint, "b")) == torch.arange(5).numpy().tobytes()
    other = open_checkpoint(base)
    assert (checkpoint.identity, checkpoint.stamps()) == (other.identity, other.stamps())
    checkpoint.check_unchanged()


def test_one_file_by_directory_or_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE_NAME)
    by_directory = open_checkpoint(tmp_path)
    by_name = open_checkpoint(str(tmp_path / SINGLE_NAME))
    for checkpoint in (by_directory, by_name):
        assert checkpoint.index is None
        assert checkpoint.weight_map == {"a": SINGLE_NAME}
        assert checkpoint.identity == by_directory.identity
    assert by_directory.directory == tmp_path
    assert by_name.directory is None


def test_a_hub_cache_is_read_through_its_symlinks(base: Path, tmp_path: Path) -> None:
    entry = tmp_path / "hub" / "models--x--y"
    blobs = entry / "blobs"
    snapshot = entry / "snapshots" / "0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(base.iterdir())):
        shutil.copy(path, blobs / f"{i:064}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{i:064}"))
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.identity == open_checkpoint(base).identity
    checkpoint.check_unchanged()
    assert f"expected {SINGLE_NAME}, found blobs, snapshots; name " in refusal(
        errors.MissingInputError, entry
    )
    (snapshot / SHARDS[1]).unlink()
    (snapshot / SHARDS[1]).symlink_to("gone")
    assert "no such file; check the path, or finish the download" in refusal(
        errors.MissingInputError, snapshot
    )


def test_unaligned_data(tmp_path: Path) -> None:
    """A header of odd length, one tensor at an odd offset, another behind a page: no alignment is assumed."""
    data = {"odd": bytes(range(7)), "x": os.urandom(8192), "y": os.urandom(9)}
    tree = {}
    at = 0
    for name, raw in data.items():
        tree[name] = {"dtype": "U8", "shape": [len(raw)], "data_offsets": [at, at + len(raw)]}
        at += len(raw)
    for pad in range(8):
        body = json.dumps(tree).encode() + b" " * pad
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(body)) + body + b"".join(data.values()))
        for io in MODES:
            checkpoint = open_checkpoint(path, io)
            for name, raw in data.items():
                file, info = checkpoint.locate(name)
                assert bytes(view(checkpoint, name)) == raw
                assert bytes(file.view(info, 3, 6)) == raw[3:6]
                assert bytes(file.view(info, 3)) == raw[3:]
                assert gather(file.chunks(info, 1000), info.nbytes) == raw


def test_an_empty_tensor(tmp_path: Path) -> None:
    save_file({"none": torch.empty(0, 3), "a": torch.ones(1)}, tmp_path / SINGLE_NAME)
    for io in MODES:
        checkpoint = open_checkpoint(tmp_path, io)
        assert bytes(view(checkpoint, "none")) == b""
        file, info = checkpoint.locate("none")
        assert list(file.chunks(info)) == []


def test_a_view_outlives_its_file(base: Path) -> None:
    for io in MODES:
        file = TensorFile(base / SHARDS[1], io)
        view = file.view(file.header.by_name["c"])
        file.close()
        file.close()
        assert bytes(view[:8]) == struct.pack("<2i", 0, 1)


def test_a_view_is_private(base: Path) -> None:
    """torch takes it as writable; a write must not reach the input."""
    before = (base / SHARDS[1]).read_bytes()
    for io in MODES:
        seen = view(open_checkpoint(base, io), "c")
        seen[:4] = b"\xff" * 4
    assert (base / SHARDS[1]).read_bytes() == before


def edit_index(base: Path, change: Callable[[dict], object]) -> None:
    tree = json.loads((base / INDEX_NAME).read_text())
    change(tree)
    (base / INDEX_NAME).write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index["metadata"].pop("total_size"), "is absent"),
        (lambda index: index.pop("metadata"), "is absent"),
        (lambda index: index.update(metadata=[1]), "is absent"),
        (lambda index: index["metadata"].update(total_size=7), "says 7"),
        (lambda index: index["metadata"].update(total_size="16064"), "says 16064"),
    ],
)
def test_total_size_absent_or_wrong_is_a_warning(
    base: Path, change: Callable[[dict], object], said: str
) -> None:
    edit_index(base, change)
    checkpoint = open_checkpoint(base)
    expected = f"{base / INDEX_NAME}: total_size {said}, the shards hold 16064 bytes; the output's will be right"
    assert checkpoint.warnings == (expected,)


# weight_map is an attack surface ------------------------------------------------------------------------------------


ATTACKS = [
    "../x.safetensors", "../../etc/passwd", "/etc/passwd", "/x.safetensors", "a/b.safetensors", "..", ".", "", "a\\b.safetensors",
    "..\\x.safetensors", "C:x.safetensors", "C:\\x.safetensors", "\\\\host\\x.safetensors", "x.safetensors\0", "x\0.safetensors",
    "x\n.safetensors", "x.safetensors\n", ".hidden.safetensors", ".streamer.safetensors", "model.bin", "model.safetensors.bin",
    "model.SAFETENSORS", "x" * 250 + ".safetensors", "é" * 125 + ".safetensors", "y" * 100_000, 5, None, True, 1.5, ["x.safetensors"],
    {"x": "x.safetensors"}, [],
]  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS, ids=lambda name: repr(name)[:30])
def test_names_that_are_not_opened(
    base: Path, monkeypatch: pytest.MonkeyPatch, name: object
) -> None:
    """Refused by the name alone: no shard has been opened, not even a good one."""
    edit_index(base, lambda index: index["weight_map"].update(c=name))
    opened: list[object] = []
    monkeypatch.setattr("streamer.storage.checkpoint.TensorFile", lambda *args: opened.append(args))
    message = refusal(errors.FormatError, base)
    assert message.startswith(f"{base / INDEX_NAME}: weight_map names ")
    assert message.endswith(": expected a plain .safetensors file name; do not trust this file")
    assert len(message) < len(str(base)) + 300
    assert opened == []


@pytest.mark.parametrize(
    "name",
    ["x.safetensors", SHARDS[0], "é b.safetensors", "ab:c.safetensors", "x" * 243 + ".safetensors"],
)
def test_plain_names(name: str) -> None:
    assert check_shard_name(name, Path("index")) == name


# What is refused ----------------------------------------------------------------------------------------------------


def test_nothing_that_could_be_a_model(tmp_path: Path) -> None:
    assert (
        refusal(errors.MissingInputError, tmp_path / "x")
        == f"{tmp_path}/x: no such directory; check the path of the base model; a hub name has the form OWNER/NAME"
    )
    assert "an address has two slashes, of which a Path keeps one" in refusal(
        errors.MissingInputError, Path("s3://models/x")
    )
    assert f"expected {SINGLE_NAME}, found nothing; name a" in refusal(
        errors.MissingInputError, tmp_path
    )
    (tmp_path / "pytorch_model.bin").touch()
    assert f"expected {SINGLE_NAME}, found pytorch_model.bin; name a" in refusal(
        errors.MissingInputError, tmp_path
    )
    assert "expected a directory or a .safetensors file" in refusal(
        errors.InputError, tmp_path / "pytorch_model.bin"
    )
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "consolidated.safetensors").touch()
    (tmp_path / "adapter_model.safetensors").touch()
    said = refusal(errors.MissingInputError, tmp_path)
    assert (
        "found adapter_model.safetensors, consolidated.safetensors; name a directory with that or an index, or the file"
        in said
    )


def test_a_single_file_and_an_index(base: Path) -> None:
    save_file({"a": torch.ones(1)}, base / SINGLE_NAME)
    words = (
        f"holds both {SINGLE_NAME} and {INDEX_NAME}; name the file you mean, or remove one of them"
    )
    assert words in refusal(errors.InputError, base)


def test_a_tensor_in_two_shards(base: Path) -> None:
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, base / SHARDS[1])
    words = f"tensor 'a': expected in {SHARDS[0]}, found in {SHARDS[0]}, {SHARDS[1]}; get index and shards of one version"
    assert refusal(errors.FormatError, base) == f"{base / INDEX_NAME}: {words}"


def test_one_shard_under_two_names(base: Path) -> None:
    (base / "again.safetensors").symlink_to(SHARDS[0])
    edit_index(base, lambda index: index["weight_map"].update(b="again.safetensors"))
    assert f"found in {SHARDS[0]}, again.safetensors" in refusal(errors.FormatError, base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"a": SHARDS[1]},
            f"tensor 'a': expected in {SHARDS[1]}, found in {SHARDS[0]}; get index and shards of one version",
        ),
        (
            {"c": SHARDS[0]},
            f"tensor 'c': expected in {SHARDS[0]}, found in no shard; get index and shards of one version",
        ),
        (
            {"d": SHARDS[0]},
            f"tensor 'd': expected in {SHARDS[0]}, found in no shard; get index and shards of one version",
        ),
    ],
)
def test_index_and_shards_disagree(base: Path, change: dict[str, str], words: str) -> None:
    edit_index(base, lambda index: index["weight_map"].update(change))
    assert refusal(errors.FormatError, base) == f"{base / INDEX_NAME}: {words}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "bad JSON: Expecting value"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "expected a weight_map, found none; get the file again"),
        ('{"weight_map": {}}', "expected a weight_map, found none"),
        ('{"weight_map": []}', "expected a weight_map, found none"),
        (
            '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
            "bad JSON: key 'a' appears twice",
        ),
        ('{"weight_map": {"\\ud800": "x.safetensors"}}', "bad JSON: "),
        ('{"metadata": {"total_size": NaN}}', "bad JSON: NaN is not a finite number"),
        ('{"metadata": {"total_size": 1e999}}', "bad JSON: 1e999 is not a finite number"),
        ("[" * 100_000, "bad JSON: nested too deeply"),
    ],
)
def test_a_bad_index(base: Path, text: str, words: str) -> None:
    (base / INDEX_NAME).write_text(text)
    message = refusal(errors.FormatError, base)
    assert message.startswith(f"{base / INDEX_NAME}: ")
    assert words in message


def test_json_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(errors.InputError, match=r"x\.json: no such file"):
        read_json_object(path)
    path.write_text('{"k": [1, "é", null]}')
    assert read_json_object(path) == {"k": [1, "é", None]}
    with monkeypatch.context() as m:
        m.setattr("streamer.storage.checkpoint.MAX_INDEX_BYTES", 10)
        with pytest.raises(errors.FormatError, match="over 10 B of JSON; this is not such a file"):
            read_json_object(path)
    os.mkfifo(tmp_path / "fifo")
    for none in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(
            errors.FormatError,
            match="expected a JSON file, found something that is not a regular file",
        ):
            read_json_object(none)


def test_a_sparse_tail(base: Path) -> None:
    """A download that reserved its space: the size fits, the data is zeros; that no header can show. A byte less does."""
    size = (base / SHARDS[1]).stat().st_size
    os.truncate(base / SHARDS[1], 1000)
    os.truncate(base / SHARDS[1], size)
    assert bytes(view(open_checkpoint(base), "c")[-4:]) == bytes(4)
    os.truncate(base / SHARDS[1], size - 1)
    assert "the file is truncated; get it again" in refusal(errors.FormatError, base)


def test_a_shard_that_cannot_be_opened(base: Path) -> None:
    (base / SHARDS[1]).unlink()
    (base / SHARDS[1]).symlink_to(SHARDS[1])
    assert "expected a safetensors file, found a link that leads to itself" in refusal(
        errors.FormatError, base
    )


# Files that change under us -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", MODES)
def test_a_file_that_shrinks_is_an_error(base: Path, io: IOMode) -> None:
    checkpoint = open_checkpoint(base, io)
    file, info = checkpoint.locate("c")
    os.truncate(base / SHARDS[1], 5000)
    words = f"{base / SHARDS[1]}: shrank to 5.0 kB during the run; get the file again"
    for read in (
        lambda: file.view(info),
        lambda: gather(file.chunks(info), info.nbytes),
        file.sample,
    ):
        with pytest.raises(errors.InputChangedError) as caught:
            read()
        assert str(caught.value) == words
        assert caught.value.exit_code == 8
    start = 3000  # what is left can still be read
    assert len(bytes(file.view(info, start, start + 100))) == 100
    with pytest.raises(errors.InputChangedError, match="changed since the run began"):
        checkpoint.check_unchanged()


def test_a_file_that_shrinks_between_check_and_map(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(base)
    file, info = checkpoint.locate("c")
    real = LocalSource._check_size

    def check(self: LocalSource, wanted: int) -> None:
        real(self, wanted)
        os.truncate(base / SHARDS[1], 100)

    monkeypatch.setattr(LocalSource, "_check_size", check)
    with pytest.raises(errors.InputChangedError, match="shrank to 100 B"):
        file.view(info)


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replace(path: Path) -> None:
    stat = path.stat()
    shutil.copy(path, path.with_name("copy"))
    os.utime(path.with_name("copy"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    path.with_name("copy").replace(path)


def grow(path: Path) -> None:
    with path.open("ab") as f:
        f.write(b"x")


@pytest.mark.parametrize("change", [touch, replace, grow, Path.unlink])
@pytest.mark.parametrize("shard", SHARDS)
def test_check_unchanged(base: Path, change: Callable[[Path], None], shard: str) -> None:
    checkpoint = open_checkpoint(base)
    checkpoint.check_unchanged()
    before = bytes(view(checkpoint, "c"))
    change(base / shard)
    with pytest.raises(errors.InputChangedError) as caught:
        checkpoint.check_unchanged()
    words = (
        "vanished during the run"
        if change is Path.unlink
        else "changed since the run began; start again, and leave the inputs unchanged"
    )
    assert str(caught.value).startswith(f"{base / shard}: {words}")
    assert bytes(view(checkpoint, "c")) == before  # the open file is still the one that was planned


def test_check_unchanged_follows_a_link_to_another_file(base: Path, tmp_path: Path) -> None:
    path = base / SHARDS[1]
    for name in ("one", "two"):
        shutil.copy(path, tmp_path / name)
    path.unlink()
    path.symlink_to(tmp_path / "one")
    checkpoint = open_checkpoint(base)
    checkpoint.check_unchanged()
    path.unlink()
    path.symlink_to(tmp_path / "two")
    with pytest.raises(errors.InputChangedError, match="changed since the run began"):
        checkpoint.check_unchanged()


# A disk that fails --------------------------------------------------------------------------------------------------


def everything(checkpoint: Checkpoint) -> list[bytes]:
    out = []
    for name in checkpoint.weight_map:
        file, info = checkpoint.locate(name)
        out += [bytes(file.view(info)), bytes(gather(file.chunks(info, 777), info.nbytes))]
    return out


@pytest.mark.parametrize("io", MODES)
def test_short_reads_are_read_on(base: Path, monkeypatch: pytest.MonkeyPatch, io: IOMode) -> None:
    checkpoint = open_checkpoint(base, io)
    expected = everything(checkpoint)
    sample = checkpoint.identity
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:13]], at))
    assert everything(checkpoint) == expected
    assert checkpoint.identity == sample


def test_a_read_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    with pytest.raises(errors.StorageError) as caught:
        view(open_checkpoint(base, "pread"), "c")
    words = "cannot read: Input/output error; run the same command again once the cause is gone"
    assert str(caught.value) == f"{base / SHARDS[1]}: {words}"


def test_a_read_that_brings_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, not an endless loop."""
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(errors.StorageError, match=f"{SHARDS[1]}: the file ended early at byte "):
        view(open_checkpoint(base, "pread"), "c")


def test_a_map_that_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamer.storage.local_source.mmap.mmap", failing(errno.ENODEV))
    with pytest.raises(
        errors.StorageError, match=r"cannot map 16\.0 kB: No such device; try --io pread"
    ):
        view(open_checkpoint(base), "c")

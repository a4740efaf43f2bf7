"""A checkpoint's tensors: shards and single files, views, samples, identity."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers import view, write_sharded
from safetensors.torch import save_file
from seeds import vary
from two_shards import MODES, SHARDS, refusal

from streamer.errors import InputError, MissingInputError
from streamer.storage.buffers import gather
from streamer.storage.checkpoint import SINGLE_NAME, open_checkpoint
from streamer.storage.tensor_file import IOMode, TensorFile


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
    checkpoint.check_unchanged()


def test_one_file_by_directory_or_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE_NAME)
    by_directory, by_name = open_checkpoint(tmp_path), open_checkpoint(str(tmp_path / SINGLE_NAME))
    for checkpoint in (by_directory, by_name):
        assert checkpoint.index is None
        assert checkpoint.weight_map == {"a": SINGLE_NAME}
        assert checkpoint.identity() == by_directory.identity()
    assert by_directory.directory == tmp_path
    assert by_name.directory is None


def test_a_hub_cache_is_read_through_its_symlinks(base: Path, tmp_path: Path) -> None:
    entry = tmp_path / "hub" / "models--x--y"
    blobs, snapshot = entry / "blobs", entry / "snapshots" / "0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(base.iterdir())):
        shutil.copy(path, blobs / f"{i:064}")
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", f"{i:064}"))
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.identity() == open_checkpoint(base).identity()
    checkpoint.check_unchanged()
    assert "is a hub cache entry, not a model; name a directory inside" in refusal(InputError, entry)
    (snapshot / SHARDS[1]).unlink()
    (snapshot / SHARDS[1]).symlink_to("gone")
    assert "no such file; check the path, or finish the download" in refusal(MissingInputError, snapshot)


def test_unaligned_data(tmp_path: Path) -> None:
    """A header of odd length, one tensor at an odd offset, another behind a page: no alignment is assumed."""
    data = {"odd": bytes(range(7)), "x": os.urandom(8192), "y": os.urandom(9)}
    tree, at = {}, 0
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


def test_both_modes_give_equal_bytes_and_samples(base: Path) -> None:
    one, two = (open_checkpoint(base, io) for io in MODES)
    for name in one.weight_map:
        assert bytes(view(one, name)) == bytes(view(two, name))
    assert one.identity() == two.identity()
    assert one.stamps() == two.stamps()


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


def test_identity_tells_models_of_one_architecture_apart(tmp_path: Path) -> None:
    identities = []
    for seed in range(2):
        weights = torch.randn(50, 50, generator=torch.Generator().manual_seed(vary(seed)))
        base = write_sharded(tmp_path / str(seed), [{"w": weights}])
        (again,) = {json.dumps(open_checkpoint(p).identity()) for p in (base, base)}
        identities.append(again)
    one, two = (json.loads(i)["files"][0] for i in identities)
    assert one["header_sha256"] == two["header_sha256"]
    assert one["sample_sha256"] != two["sample_sha256"]

"""Which files make a checkpoint: the index, names, shards that are missing or disagree."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from two_shards import SHARDS, refusal

from streamer.errors import FormatError, InputError, MissingInputError, UnsupportedError
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, check_shard_name, open_checkpoint, read_json_object


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
def test_total_size_absent_or_wrong_is_a_warning(base: Path, change: Callable[[dict], object], said: str) -> None:
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
def test_names_that_are_not_opened(base: Path, monkeypatch: pytest.MonkeyPatch, name: object) -> None:
    """Refused by the name alone: no shard has been opened, not even a good one."""
    edit_index(base, lambda index: index["weight_map"].update(c=name))
    opened: list[object] = []
    monkeypatch.setattr("streamer.storage.checkpoint.TensorFile", lambda *args: opened.append(args))
    message = refusal(FormatError, base)
    assert message.startswith(f"{base / INDEX_NAME}: weight_map names ")
    assert message.endswith(": expected a plain .safetensors file name; do not trust this file")
    assert len(message) < len(str(base)) + 300
    assert opened == []


@pytest.mark.parametrize(
    "name", ["x.safetensors", SHARDS[0], "é b.safetensors", "ab:c.safetensors", "x" * 243 + ".safetensors"]
)
def test_plain_names(name: str) -> None:
    assert check_shard_name(name, Path("index")) == name


# What is refused ----------------------------------------------------------------------------------------------------


def test_nothing_that_could_be_a_model(tmp_path: Path) -> None:
    assert (
        refusal(MissingInputError, tmp_path / "x")
        == f"{tmp_path}/x: no such directory; check the path of the base model"
    )
    assert f"expected {SINGLE_NAME} or {INDEX_NAME}, found neither" in refusal(MissingInputError, tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "holds weights as pickles only; convert them to safetensors first" in refusal(UnsupportedError, tmp_path)
    assert "expected a directory or a .safetensors file" in refusal(InputError, tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "consolidated.safetensors").touch()
    assert "but consolidated.safetensors; name the file itself if it is the model" in refusal(InputError, tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    assert "is an adapter, not a base model; the order is BASE ADAPTER" in refusal(InputError, tmp_path)


def test_a_single_file_and_an_index(base: Path) -> None:
    save_file({"a": torch.ones(1)}, base / SINGLE_NAME)
    words = f"holds both {SINGLE_NAME} and {INDEX_NAME}; name the file you mean, or remove one of them"
    assert words in refusal(InputError, base)


def test_a_missing_shard(base: Path) -> None:
    (base / SHARDS[1]).unlink()
    expected = f"{base / SHARDS[1]}: no such file; check the path, or finish the download"
    assert refusal(MissingInputError, base) == expected


def test_a_tensor_in_two_shards(base: Path) -> None:
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, base / SHARDS[1])
    expected = f"{base / SHARDS[1]}: tensor 'a' is in {SHARDS[0]} as well; get the shards again"
    assert refusal(FormatError, base) == expected


def test_one_shard_under_two_names(base: Path) -> None:
    (base / "again.safetensors").symlink_to(SHARDS[0])
    edit_index(base, lambda index: index["weight_map"].update(b="again.safetensors"))
    assert f"tensor 'b' is in {SHARDS[0]} as well" in refusal(FormatError, base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": SHARDS[1]}, f"tensor 'a': expected in {SHARDS[1]}, but it is in {SHARDS[0]}; get the shards again"),
        ({"c": SHARDS[0]}, f"tensor 'c': expected in {SHARDS[0]}, but no shard has it; get the shards again"),
        ({"d": SHARDS[0]}, f"tensor 'd': expected in {SHARDS[0]}, but no shard has it; get the shards again"),
    ],
)
def test_index_and_shards_disagree(base: Path, change: dict[str, str], words: str) -> None:
    edit_index(base, lambda index: index["weight_map"].update(change))
    assert refusal(FormatError, base) == f"{base / INDEX_NAME}: {words}"


def test_tensors_that_the_index_does_not_list(base: Path) -> None:
    edit_index(base, lambda index: index["weight_map"].pop("b"))
    words = "1 tensors are in the shards but not in the index, 'b' first; get index and shards of one version"
    assert refusal(FormatError, base) == f"{base / INDEX_NAME}: {words}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "bad JSON: Expecting value"),
        ("[]", "expected a JSON object, found list"),
        ("{}", "expected a weight_map, found none; get the file again"),
        ('{"weight_map": {}}', "expected a weight_map, found none"),
        ('{"weight_map": []}', "expected a weight_map, found none"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "bad JSON: key 'a' appears twice"),
        ('{"weight_map": {"\\ud800": "x.safetensors"}}', "bad JSON: "),
        ('{"metadata": {"total_size": NaN}}', "bad JSON: NaN is not JSON"),
        ('{"metadata": {"total_size": 1e999}}', "bad JSON: number 1e999 is out of range"),
        ("[" * 100_000, "bad JSON: nested too deeply"),
    ],
)
def test_a_bad_index(base: Path, text: str, words: str) -> None:
    (base / INDEX_NAME).write_text(text)
    message = refusal(FormatError, base)
    assert message.startswith(f"{base / INDEX_NAME}: ")
    assert words in message


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(InputError, match=r"x\.json: no such file"):
        read_json_object(path)
    path.write_text('{"k": [1, "é", null]}')
    assert read_json_object(path) == {"k": [1, "é", None]}
    with pytest.raises(FormatError, match="over 10 B of JSON; this is not such a file"):
        read_json_object(path, limit=10)
    os.mkfifo(tmp_path / "fifo")
    for none in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(FormatError, match="expected a JSON file, found something that is not a regular file"):
            read_json_object(none)

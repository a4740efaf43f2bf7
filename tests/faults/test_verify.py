"""Outputs that were changed after they were written: what `verify` says of each change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from forks import server
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from seeds import vary
from test_schemas import check
from verified import KINDS, Job, agree, edit_record, edit_tensor, files_of, lines, make_all_outputs, reseal, sha256

import streamer


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_all_outputs(*helpers.three_shards(home := tmp_path_factory.mktemp("verify")), home)


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_anywhere_is_one_line(job: Job, tmp_path: Path, kind: str) -> None:
    output = job.copy(kind, tmp_path)
    generator = np.random.default_rng(vary(0))
    for path in files_of(output):
        whole = path.read_bytes()
        positions = {0, 7, 8, 9, len(whole) // 2, len(whole) - 1, *generator.integers(0, len(whole), 12).tolist()}
        for at in sorted(p for p in positions if p < len(whole)):
            changed = bytearray(whole)
            changed[at] ^= 1 << int(generator.integers(8))
            path.write_bytes(changed)
            found = lines(output)
            assert len(found) == 1, (at, found)
            (line,) = found
            assert line.startswith(f"{path}: "), (at, line)
            assert ": expected " in line
            assert ", found " in line
        path.write_bytes(whole)
    assert lines(output) == []


@pytest.mark.parametrize("name", ["model/model-00002-of-00003.safetensors", "model/tokenizer.json", "model/1_Pooling/config.json",
                                  "model/config.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"])  # fmt: skip
def test_the_line_of_a_flipped_byte(job: Job, tmp_path: Path, name: str) -> None:
    kind, _, inner = name.partition("/")
    output = job.copy(kind, tmp_path)
    path = output / inner
    wanted, data = sha256(path), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = server().run("verify", output)
    line = f"{path}: expected SHA-256 {wanted} by streamer.json, found {sha256(path)}"
    assert (done.code, done.out, done.err) == (7, "", f"streamer: {line}\n")
    tree = check(server().run("verify", output, "--json"), "streamer.verification/1", 7)
    assert [d["message"] for d in tree["differences"]] == [line]
    done = server().run("verify", output, "--json-events")
    last = json.loads(done.err.splitlines()[-1])
    assert (last["event"], last["kind"], last["exit_code"], last["path"]) == (
        "error",
        "VerificationError",
        7,
        str(path),
    )


def test_the_line_of_a_flipped_byte_in_findings(job: Job, tmp_path: Path) -> None:
    path = job.copy("findings.safetensors", tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (line,) = lines(path)
    with safe_open(path, "pt") as f:
        stated = f.metadata()["sha256"]
    zeroed = bytes(data).replace(stated.encode(), b"0" * 64)
    assert line == f"{path}: expected SHA-256 {stated} by its own metadata, found {hashlib.sha256(zeroed).hexdigest()}"


# Files and index ---------------------------------------------------------------------------------------------------------


def test_missing_truncated_swapped_and_extra_files(job: Job, tmp_path: Path) -> None:
    output = job.copy("model", tmp_path)
    one, two, three = (output / f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    index = output / "model.safetensors.index.json"
    size, length = one.stat().st_size, index.stat().st_size
    digests = {path: sha256(path) for path in (two, three)}

    one.rename(tmp_path / "aside")
    assert lines(output) == [f"{one}: expected a file of {size} bytes by streamer.json, found none"]
    (tmp_path / "aside").rename(one)

    whole = index.read_bytes()
    index.write_bytes(whole[:-10])
    assert lines(output) == [f"{index}: expected {length} bytes by streamer.json, found {length - 10}"]
    index.write_bytes(whole)

    assert two.stat().st_size == three.stat().st_size
    two.rename(tmp_path / "aside")
    three.rename(two)
    (tmp_path / "aside").rename(three)
    assert lines(output) == [
        f"{path}: expected SHA-256 {digests[path]} by streamer.json, found {digests[other]}"
        for path, other in ((two, three), (three, two))
    ]
    two.rename(tmp_path / "aside")
    three.rename(two)
    (tmp_path / "aside").rename(three)

    for name in ("model-00004-of-00003.safetensors", "pytorch_model.bin", "adapter_config.json"):
        (output / name).write_bytes(b"")
        assert lines(output) == [f"{output / name}: expected no such file by streamer.json, found one"]
        (output / name).unlink()
    for name in ("notes.txt", "training_args.bin", "optimizer.bin"):
        (output / name).write_bytes(b"one's own")
    assert lines(output) == []


def test_an_index_that_is_not_of_its_shards(job: Job, tmp_path: Path) -> None:
    """The record agrees with it: only the shards' own headers tell."""
    output = job.copy("model", tmp_path)
    index = output / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    moved, lost, more = "model.layers.0.counter", "model.layers.1.counter", "model.layers.9.counter"
    shard = tree["weight_map"]
    home = {moved: shard[moved], lost: shard.pop(lost)}
    shard[moved] = shard[more] = "model-00003-of-00003.safetensors"
    size = tree["metadata"]["total_size"]
    tree["metadata"]["total_size"] = size - 1
    index.write_text(json.dumps(tree))
    agree(output, index.name)
    assert lines(output) == [
        f"{index}: tensor {moved!r}: expected the shard that holds it, {home[moved]}, found model-00003-of-00003.safetensors",
        f"{index}: tensor {lost!r}: expected the shard that holds it, {home[lost]}, found none",
        f"{index}: tensor {more!r}: expected the shard that holds it, none, found model-00003-of-00003.safetensors",
        f"{index}: expected total_size {size}, the bytes of all tensors, found {size - 1}",
    ]


def test_names_dtypes_and_shapes_are_the_bases(job: Job, tmp_path: Path) -> None:
    output = job.copy("model", tmp_path)
    shard = output / "model-00001-of-00003.safetensors"
    with safe_open(shard, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(shard)
    name = "model.layers.0.input_layernorm.weight"
    tensors[name] = tensors[name].half()
    save_file(tensors, shard, metadata)
    agree(output, shard.name)
    assert lines(output) == []
    assert lines(output, job.base, job.adapter) == [
        f"{output}: tensor {name!r}: expected BF16 [48] as in the base, found F16 [48]"
    ]


# The record --------------------------------------------------------------------------------------------------------------


def test_lambda_tampered_in_the_record(job: Job, tmp_path: Path) -> None:
    for kind, file in (("model", "model-00001-of-00003.safetensors"), ("adapter", "adapter_model.safetensors")):
        output = job.copy(kind, tmp_path)
        record = output / "streamer.json"
        record.write_text(record.read_text().replace('"lambda": 0.5', '"lambda": 0.7'))
        line = f"{record}: expected lambda 0.5, as in the metadata of {file}, found 0.7"
        assert lines(output)[0] == line
        edit_record(output, lambda tree: None)
        assert lines(output)[0] == line
        assert set(lines(output)) <= {line.replace("00001", f"0000{i}") for i in (1, 2, 3)}


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_lambda_tampered_everywhere_is_found_by_recomputing(job: Job, tmp_path: Path, kind: str) -> None:
    output = job.copy(kind, tmp_path)
    for path in output.glob("*.safetensors"):
        data = path.read_bytes()
        assert data.count(b'\\"lambda\\": 0.5') == 1
        path.write_bytes(data.replace(b'\\"lambda\\": 0.5', b'\\"lambda\\": 0.7'))

    def change(record: dict[str, Any]) -> None:
        record["lambda"] = 0.7
        for entry in record["files"]:
            entry["sha256"] = sha256(output / entry["file"])

    edit_record(output, change)
    assert lines(output) == []
    found = lines(output, job.base, job.adapter)
    assert found
    assert all("expected d" in line or " within one rounding" in line for line in found)


def test_a_records_sums_and_digests(job: Job, tmp_path: Path) -> None:
    output = job.copy("model", tmp_path)
    record = output / "streamer.json"

    def change(tree: dict[str, Any]) -> None:
        tree["totals"]["intruders"] += 1
        tree["base"]["files"][0]["bytes"] += 1

    before = json.loads(record.read_text())
    edit_record(output, change)
    total = before["totals"]["intruders"]
    first, second = lines(output)
    assert first == f"{record}: expected totals.intruders {total}, the sum over its entries, found {total + 1}"
    assert second.startswith(f"{record}: expected base.digest ")
    assert second.endswith(f", found {before['base']['digest']!r}")


def test_a_record_of_another_schema(job: Job, tmp_path: Path) -> None:
    """One that a later version wrote, with a digest that is right, is refused; a flipped digit of the schema's name differs."""
    output = job.copy("adapter", tmp_path)
    record = output / "streamer.json"
    record.write_text(record.read_text().replace("streamer.output/2", "streamer.output/3"))
    assert lines(output) == [
        f"{record}: expected the record of an output, found 'schema' missing, of another kind or unknown"
    ]
    edit_record(output, lambda tree: None)
    with pytest.raises(streamer.StreamerError, match="verify it with the version of streamer that wrote it") as e:
        streamer.verify_output(output)
    assert e.value.exit_code == 3


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_a_later_version_adds(job: Job, tmp_path: Path, kind: str) -> None:
    """They stand under a digest; in a file that holds none an unknown key is damage."""
    output = job.copy(kind, tmp_path)
    if output.is_file():
        reseal(output, later="1")
        assert lines(output) == []
        reseal(output, later="1", sealed=False)
        (line,) = lines(output, job.base, job.adapter)
        assert line.startswith(f"{output}: expected metadata of streamer.findings/1, found ")
        return
    path = output / "streamer.json"
    edit_record(output, lambda tree: tree.update(later=[1]))
    assert lines(output, job.base, job.adapter) == []
    record = json.loads(path.read_text())
    del record["sha256"]
    path.write_text(json.dumps(record))
    (line,) = lines(output)
    assert line == f"{path}: expected the record of an output, found 'later' missing, of another kind or unknown"
    del record["later"]
    path.write_text(json.dumps(record))
    assert lines(output) == []


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"schema": "streamer.output/2"}'])
def test_a_record_that_is_none(job: Job, tmp_path: Path, text: str) -> None:
    output = job.copy("adapter", tmp_path)
    (output / "streamer.json").write_text(text)
    (line,) = lines(output)
    assert line.startswith(f"{output / 'streamer.json'}: expected the record of an output, found ")


# What only recomputing finds ---------------------------------------------------------------------------------------------


def test_a_wrong_tensor_with_a_consistent_digest(job: Job, tmp_path: Path) -> None:
    output = job.copy("model", tmp_path)
    shard, name = output / "model-00002-of-00003.safetensors", "model.layers.1.mlp.up_proj.weight"

    def next_value(tensor: torch.Tensor) -> None:
        tensor.view(torch.int16)[3, 5] += 2

    edit_tensor(shard, name, next_value)
    agree(output, shard.name)
    assert lines(output) == []
    (line,) = lines(output, job.base, job.adapter, sample="all")
    assert line.startswith(f"{shard}: tensor {name!r}: expected W0 + Δ' within one rounding, found ")
    assert line.endswith(" times that in element [3, 5]")


def test_a_wrong_factor_with_a_consistent_digest(job: Job, tmp_path: Path) -> None:
    output = job.copy("adapter", tmp_path)
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"
    edit_tensor(
        output / "adapter_model.safetensors", name, lambda t: t.mul_(1.01)
    )  # one row may have next to nothing of it
    agree(output, "adapter_model.safetensors")
    assert lines(output) == []
    found = lines(output, job.base, job.adapter, sample="all")
    assert found[0].startswith(
        f"{output / 'adapter_model.safetensors'}: tensor 'model.layers.2.mlp.down_proj.weight': expected the nearest"
    )


FINDINGS = {
    "U": (lambda t: t[3].mul_(1.5), "expected residuals of its triplets as recomputed, found direction 0"),
    "S": (lambda t: t.mul_(1.001), "expected residuals of its triplets as recomputed, found direction 0"),
    "base_singular_values": (
        lambda t: t[1].mul_(1.01),
        "expected singular values of the base as recomputed, found direction 1",
    ),
    "singular_values": (lambda t: t[1].mul_(1.01), "expected singular values as recomputed, found direction 1"),
}


@pytest.mark.parametrize("key", FINDINGS)
def test_wrong_findings_with_a_consistent_digest(job: Job, tmp_path: Path, key: str) -> None:
    path, tensor = job.copy("findings.safetensors", tmp_path), "model.layers.0.self_attn.q_proj.weight"
    change, line = FINDINGS[key]
    edit_tensor(path, f"{tensor}/{key}", change)
    reseal(path)
    assert lines(path) == []
    (found,) = lines(path, job.base, job.adapter, sample="all")
    assert found.startswith(f"{path}: tensor {tensor!r}: {line}")


def test_a_wrong_decision(job: Job, tmp_path: Path) -> None:
    """An intruder that a record does not list, and one that it lists and is none."""
    output = job.copy("model", tmp_path)

    record = output / "streamer.json"
    one, other = json.loads(record.read_text())["matrices"][:2]
    (lost,) = one["intruders"]
    more = max(other["intruders"]) + 1

    def change(tree: dict[str, Any]) -> None:
        tree["matrices"][0]["intruders"] = []
        tree["matrices"][1]["intruders"].append(more)

    edit_record(output, change)
    first, second = sorted(
        lines(output, job.base, job.adapter, sample="all"), key=lambda line: one["tensor"] not in line
    )
    assert first.startswith(
        f"{record}: tensor {one['tensor']!r}: expected direction {lost} to be an intruder, with a similarity of "
    )
    assert first.endswith(", found intruders []")
    assert second.startswith(
        f"{record}: tensor {other['tensor']!r}: expected direction {more} to be no intruder, with a similarity of "
    )

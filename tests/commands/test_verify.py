"""`streamer verify`: what the commands wrote is as they wrote it; every byte that is not is found, and so is what a digest cannot tell."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers
import jobs
import numpy as np
import peft
import pytest
import torch
from forks import server
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_schemas import check
from transformers import LlamaConfig, LlamaForCausalLM

import streamer


@dataclass(frozen=True)
class Job:
    """Inputs, and what the commands made of them: ``model``, ``adapter`` and ``findings``, at λ = 0.5."""

    base: Path
    adapter: Path
    home: Path

    def copy(self, kind: str, to: Path) -> Path:
        """A copy of one of the outputs."""
        source = self.home / kind
        if source.is_dir():
            return Path(shutil.copytree(source, to / kind))
        return Path(shutil.copy(source, to / kind))


KINDS = ("model", "adapter", "findings.safetensors")


def make_outputs(base: Path, adapter: Path, home: Path, **options: Any) -> Job:
    findings = home / "findings.safetensors"
    streamer.detect_intruder_dimensions(base, adapter, findings)
    made = {"findings": findings, "mitigation_lambda": 0.5, **options}
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, home / "model", **made)
    return Job(base, adapter, home)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    home = tmp_path_factory.mktemp("verify")
    made = make_outputs(*helpers.three_shards(home), home)
    streamer.reduce_intruder_dimension(
        made.base, made.adapter, home / "adapter-out", findings=home / "findings.safetensors", mitigation_lambda=0.5
    )
    (home / "adapter").rename(home / "inputs")
    (home / "adapter-out").rename(home / "adapter")
    return Job(made.base, home / "inputs", home)


def lines(output: Path, *inputs: Path, **options: Any) -> list[str]:
    """The lines of what differs; none if nothing does."""
    try:
        found = streamer.verify_output(output, *inputs, **options)
    except streamer.VerificationError as e:
        found = e.verification
    assert found["verified"] == (not found["differences"])
    assert found["totals"]["differences"] == len(found["differences"])
    return [d["message"] for d in found["differences"]]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit_record(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a record anew, with a digest that is right."""
    path = output / "streamer.json"
    record = json.loads(path.read_text())
    change(record)
    record["sha256"] = "0" * 64
    record["sha256"] = hashlib.sha256((json.dumps(record, indent=1) + "\n").encode()).hexdigest()
    path.write_text(json.dumps(record, indent=1) + "\n")


def agree(output: Path, name: str) -> None:
    """Let the record have a file as it is now."""

    def change(record: dict[str, Any]) -> None:
        entry = next(f for f in record["files"] if f["file"] == name)
        entry |= {"bytes": (output / name).stat().st_size, "sha256": sha256(output / name)}
        record["totals"]["bytes"] = sum(f["bytes"] for f in record["files"])

    edit_record(output, change)


def edit_tensor(path: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change a tensor of a file, and nothing else of it."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, metadata)


# Nothing differs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_commands_wrote_is_as_they_wrote_it(job: Job, kind: str) -> None:
    output = job.home / kind
    tree = check(server().run("verify", output, "--json"), "streamer.verification/1")
    assert (tree["verified"], tree["kind"]) == (True, kind.partition(".")[0])
    assert "inputs" not in tree
    assert tree["totals"]["recomputed"] == 0
    if output.is_dir():
        names = {p.name for p in output.rglob("*") if p.is_file()} - {"streamer.json"}
        assert tree["totals"]["files"] == len(json.loads((output / "streamer.json").read_text())["files"]) >= len(names)
    tree = check(
        server().run("verify", output, job.base, job.adapter, "--sample", "all", "--json"), "streamer.verification/1"
    )
    assert tree["totals"]["recomputed"] == tree["totals"]["matrices"] == 9
    assert all(0 < r["error"] <= 1 and r["decisions"] for r in tree["recomputed"])


def test_a_sample_is_spread_over_kinds_and_the_same_each_time(job: Job) -> None:
    def sample(**options: Any) -> list[str]:
        found = streamer.verify_output(job.home / "model", job.base, job.adapter, **options)
        return [r["tensor"] for r in found["recomputed"]]

    assert sample() == sample()
    assert {name.split(".", 3)[3] for name in sample()} == {f"{module}.weight" for module in helpers.MODULES}
    assert sample(sample=5)[:3] == sample()
    assert len(set(sample(sample=5))) == 5
    assert len(sample(sample=100)) == 9


@pytest.mark.parametrize("method", ["paper", "project", "shrink"])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_method_lambda_and_dtype(tmp_path: Path, method: Any, lam: float, dtype: torch.dtype) -> None:
    base, adapter = helpers.three_shards(tmp_path, dtype)
    made = {"mitigation_lambda": lam, "method": method, "scale": "first" if lam else "all"}
    for write in (streamer.merge_with_reduced_intruder_dimensions, streamer.reduce_intruder_dimension):
        write(base, adapter, tmp_path / write.__name__, **made)  # type: ignore[operator]
        assert lines(tmp_path / write.__name__, base, adapter, sample="all") == []


@pytest.mark.parametrize("kind", ["fp8", "dora"])
def test_other_kinds_are_recomputed(tmp_path: Path, kind: str) -> None:
    base, adapter = getattr(jobs, kind)(tmp_path)
    made = make_outputs(base, adapter, tmp_path)
    for output in ("model", "findings.safetensors"):
        found = streamer.verify_output(made.home / output, base, adapter, sample="all")
        assert found["totals"]["recomputed"] == found["totals"]["matrices"] > 0
    options: dict[str, Any] = {"to_lora": 3} if kind == "dora" else {}
    streamer.reduce_intruder_dimension(base, adapter, tmp_path / "out", mitigation_lambda=0.5, **options)
    assert lines(tmp_path / "out", base, adapter, sample="all") == []
    if kind == "fp8":
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "plain", dequantize=True)
        assert lines(tmp_path / "plain", base, adapter, sample="all") == []


def test_a_fine_tuned_model_in_the_adapters_place(tmp_path: Path) -> None:
    base, _ = helpers.three_shards(tmp_path)
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    for shard in tuned.glob("*.safetensors"):
        generator = torch.Generator().manual_seed(1)
        tensors = {
            k: (t + 0.1 * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.dim() == 2 else t
            for k, t in load_file(shard).items()
        }
        save_file(tensors, shard, metadata={"format": "pt"})
    made = make_outputs(base, tuned, tmp_path)
    for output in ("model", "findings.safetensors"):
        found = streamer.verify_output(made.home / output, base, tuned, sample="all")
        assert found["totals"]["recomputed"] == 9


def test_what_no_formula_covers_is_said_and_not_counted(tmp_path: Path) -> None:
    base, adapter = jobs.experts(tmp_path)
    make_outputs(base, adapter, tmp_path)
    with pytest.warns(
        streamer.StreamerWarning,
        match="none of its matrices could be recomputed: it is no tensor of the base by itself",
    ):
        found = streamer.verify_output(tmp_path / "model", base, adapter, sample="all")
    assert found["totals"] | {"files": 0, "bytes": 0} == {
        "files": 0, "bytes": 0, "matrices": 6, "recomputed": 0, "not_recomputed": 6, "differences": 0,
    }  # fmt: skip
    assert {s["tensor"] for s in found["not_recomputed"]} >= {"model.layers.0.mlp.experts.down_proj[0]"}


def test_outputs_of_several_adapters(tmp_path: Path) -> None:
    base, adapters = jobs.several(tmp_path)
    out = tmp_path / "models"
    streamer.merge_with_reduced_intruder_dimensions(base, [adapters], out, mitigation_lambda=0.5)
    for name, replaced in (("lora", 0), ("dora", 0), ("saved", 1)):
        found = streamer.verify_output(out / name, base, adapters / name, sample="all")
        assert found["totals"]["recomputed"] > 0
        assert [s["reason"] for s in found["not_recomputed"]] == [
            "the adapter brings values for it besides its factors"
        ] * replaced
    with pytest.raises(streamer.StreamerError, match=r"name one of the outputs in it: dora, lora, saved") as e:
        streamer.verify_output(out)
    assert e.value.exit_code == 3


def test_adapters_that_peft_trained(tmp_path: Path) -> None:
    """RsLoRA, patterns of rank and alpha, DoRA, an embedding, on a Llama that transformers saved."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4
    )
    base = tmp_path / "base"
    LlamaForCausalLM(config).bfloat16().save_pretrained(base)
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {r".*layers.1.self_attn.q_proj": 3}}
    cases = {
        "rslora": {"use_rslora": True, "target_modules": ["q_proj", "down_proj"], **patterns},
        "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj"], **patterns},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    }
    for name, options in cases.items():
        model = peft.get_peft_model(
            LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, lora_alpha=8, **options)
        )
        for parameter in (p for p in model.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
        streamer.merge_with_reduced_intruder_dimensions(
            base, tmp_path / name, tmp_path / f"{name}-m", mitigation_lambda=0.25
        )
        found = streamer.verify_output(tmp_path / f"{name}-m", base, tmp_path / name, sample="all")
        assert found["totals"]["recomputed"] == found["totals"]["matrices"] - len(found["not_recomputed"]) >= 2, found


# One byte ----------------------------------------------------------------------------------------------------------------


def files_of(output: Path) -> list[Path]:
    return sorted(p for p in output.rglob("*") if p.is_file()) if output.is_dir() else [output]


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_anywhere_is_one_line(job: Job, tmp_path: Path, kind: str) -> None:
    output = job.copy(kind, tmp_path)
    generator = np.random.default_rng(0)
    for path in files_of(output):
        whole = path.read_bytes()
        positions = {0, 7, 8, 9, len(whole) // 2, len(whole) - 1, *generator.integers(0, len(whole), 12).tolist()}
        for at in sorted(p for p in positions if p < len(whole)):
            changed = bytearray(whole)
            changed[at] ^= 1 << int(generator.integers(8))
            path.write_bytes(changed)
            (line,) = lines(output)
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


def test_findings_without_a_digest_take_the_inputs(job: Job, tmp_path: Path) -> None:
    path = job.copy("findings.safetensors", tmp_path)
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    del metadata["sha256"]
    save_file(load_file(path), path, metadata)
    with pytest.raises(streamer.StreamerError, match="holds no digest") as e:
        streamer.verify_output(path)
    assert e.value.exit_code == 3
    assert lines(path, job.base, job.adapter, sample="all") == []


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
    (output / "notes.txt").write_text("one's own")
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
        line = f"{record}: expected lambda 0.5, as the metadata of {file} have it, found 0.7"
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
    edit_tensor(output / "adapter_model.safetensors", name, lambda t: t[0].mul_(1.01))
    agree(output, "adapter_model.safetensors")
    assert lines(output) == []
    found = lines(output, job.base, job.adapter, sample="all")
    assert found[0].startswith(
        f"{output / 'adapter_model.safetensors'}: tensor 'model.layers.2.mlp.down_proj.weight': expected the nearest"
    )


def reseal(path: Path) -> None:
    """Give findings a digest that is right."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    save_file(load_file(path), path, metadata | {"sha256": "0" * 64})
    digest = sha256(path)
    path.write_bytes(path.read_bytes().replace(b"0" * 64, digest.encode(), 1))


FINDINGS = {
    "U": (lambda t: t[3].mul_(1.5), "expected residuals of its triplets as recomputed, found direction 0"),
    "S": (lambda t: t.mul_(1.001), "expected residuals of its triplets as recomputed, found direction 0"),
    "singular_values": (lambda t: t[1].mul_(1.01), "expected singular values as recomputed, found direction 1"),
    "similarity_low": (
        lambda t: t[0].add_(0.6),
        "expected similarities within their intervals as recomputed, found direction 0",
    ),
}


@pytest.mark.parametrize("key", FINDINGS)
def test_wrong_findings_with_a_consistent_digest(job: Job, tmp_path: Path, key: str) -> None:
    path, tensor = job.copy("findings.safetensors", tmp_path), "model.layers.0.self_attn.q_proj.weight"
    change, line = FINDINGS[key]
    edit_tensor(path, f"{tensor}/{key}", change)
    reseal(path)
    assert lines(path) == []
    found = lines(path, job.base, job.adapter, sample="all")
    assert all(text.startswith(f"{path}: tensor {tensor!r}: expected ") for text in found)
    assert any(line in text for text in found), found


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


# Refusals ----------------------------------------------------------------------------------------------------------------


def test_refusals(job: Job, tmp_path: Path) -> None:
    other, _ = helpers.three_shards(tmp_path / "other", hidden=64)
    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, weights)
    (tmp_path / "empty").mkdir()
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((tmp_path / "no",), 3, f"{tmp_path / 'no'}: expected an output of streamer, found nothing"),
        (
            (tmp_path / "empty",),
            3,
            f"{tmp_path / 'empty'}: expected streamer.json, the record of a finished output, found none",
        ),
        ((weights,), 3, f"{weights}: expected findings or an output's directory, found another safetensors file"),
        ((job.base / "config.json",), 3, f"{job.base / 'config.json'}: expected an output's directory or findings"),
        ((job.home / "model", job.base), 2, "verify: expected BASE and ADAPTER, found one of them"),
        ((job.home / "model", job.base, job.adapter, "--sample", "0"), 2, "--sample"),
        ((job.home / "model", other, job.adapter), 3, f"{other / 'model-00001-of-00003.safetensors'}: expected "),
        (
            (job.home / "model", job.base, job.home / "adapter"),
            3,
            f"{job.home / 'adapter' / 'adapter_model.safetensors'}: expected ",
        ),
        (
            (job.home / "model", tmp_path / "empty", job.adapter),
            3,
            f"{tmp_path / 'empty'}: expected model-00001-of-00003.safetensors",
        ),
    ]
    for argv, code, message in cases:
        done = server().run("verify", *argv)
        assert done.code == code, done
        assert message in done.err
        assert "Traceback" not in done.err


def test_max_memory_leaves_matrices_out(job: Job) -> None:
    with pytest.warns(streamer.StreamerWarning, match="over the 100M of max_memory"):
        found = streamer.verify_output(job.home / "model", job.base, job.adapter, max_memory="100M")
    assert (found["totals"]["recomputed"], found["totals"]["not_recomputed"]) == (0, 9)


def test_without_inputs_no_torch_is_loaded(job: Job) -> None:
    code = (
        "import sys; from streamer.cli.main import run; code = run(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    )
    line = [sys.executable, "-c", code, "verify", str(job.home / "model"), "-q"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=helpers.ENV)
    assert done.stdout == "0 False\n"


def test_the_text_for_people(job: Job) -> None:
    done = server().run("verify", job.home / "model", job.base, job.adapter)
    first, second = done.out.splitlines()
    assert first == f"{job.home / 'model'}: 8 files, 74.5 kB, as recorded"
    assert second == "3 of 9 matrices recomputed, each within its rounding"
    assert done.last.startswith("streamer: verify: 8 files, 74.5 kB, nothing differs, 3 matrices recomputed, in ")


def test_progress_is_told_in_bytes_and_matrices(job: Job) -> None:
    events: list[streamer.Event] = []
    streamer.verify_output(job.home / "model", job.base, job.adapter, on_event=events.append)
    assert {e.stage for e in events} == {"verify", "recompute"}
    for stage in ("verify", "recompute"):
        done = [e.done for e in events if e.stage == stage]
        assert done == sorted(done)
        assert done[-1] == next(e.total for e in events if e.stage == stage)
        assert not any(math.isnan(value) for value in done)

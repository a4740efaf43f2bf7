"""Outputs that were changed after they were written: what `verify` says of each change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import peft
import pytest
import torch
from forks import server
from kinds import llama_config
from safetensors.torch import load_file, save_file
from seeds import vary
from test_schemas import check
from transformers import LlamaForCausalLM
from verified import KINDS, Job, agree, edit_record, edit_tensor, lines, make_all_outputs, sha256

import streamer

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_all_outputs(*helpers.three_shards(home := tmp_path_factory.mktemp("verify")), home)


# Digests -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_anywhere_is_one_line(job: Job, tmp_path: Path, kind: str) -> None:
    output = job.copy(kind, tmp_path)
    generator = np.random.default_rng(vary(0))
    for path in sorted(p for p in output.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        positions = {
            0,
            7,
            8,
            9,
            len(whole) // 2,
            len(whole) - 1,
            *generator.integers(0, len(whole), 12).tolist(),
        }
        for at in sorted(p for p in positions if p < len(whole)):
            changed = bytearray(whole)
            changed[at] ^= 1 << int(generator.integers(8))
            path.write_bytes(changed)
            found = lines(output)
            assert len(found) == (path.name != "README.md"), (at, found)  # anyone may edit the card
            assert all(
                line.startswith(f"{path}: expected ") and ", found " in line for line in found
            ), (at, found)
        path.write_bytes(whole)
    assert lines(output) == []


@pytest.mark.parametrize("name", [f"model/{SHARDS[1]}", "adapter/adapter_config.json"])
def test_the_line_of_a_flipped_byte(job: Job, tmp_path: Path, name: str) -> None:
    kind, _, inner = name.partition("/")
    output = job.copy(kind, tmp_path)
    path = output / inner
    wanted = sha256(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = server().run("verify", output)
    line = f"{path}: expected SHA-256 {wanted} by streamer.json, found {sha256(path)}"
    assert (done.code, done.out, done.err) == (7, "", f"streamer: {line}\n")
    tree = check(server().run("verify", output, "--json"), "streamer.verification/1", 7)
    assert ([d["message"] for d in tree["differences"]], tree["verified"]) == ([line], False)
    done = server().run("verify", output, "--json-events")
    last = json.loads(done.err.splitlines()[-1])
    said = last["event"], last["kind"], last["exit_code"], last["path"]
    assert said == ("error", "VerificationError", 7, str(path))


def test_missing_truncated_swapped_and_extra_files_are_reported(job: Job, tmp_path: Path) -> None:
    output = job.copy("model", tmp_path)
    one, two, three = (output / name for name in SHARDS)
    size = one.stat().st_size
    one.rename(tmp_path / "aside")
    assert lines(output) == [f"{one}: expected {size} bytes by streamer.json, found no file"]
    (tmp_path / "aside").rename(one)
    whole = one.read_bytes()
    one.write_bytes(whole[:-10])
    assert lines(output) == [f"{one}: expected {size} bytes by streamer.json, found {size - 10}"]
    one.write_bytes(whole)
    digests = {path: sha256(path) for path in (two, three)}
    assert two.stat().st_size == three.stat().st_size
    two.rename(tmp_path / "aside")
    three.rename(two)
    (tmp_path / "aside").rename(three)
    assert lines(output) == [
        f"{path}: expected SHA-256 {digests[path]} by streamer.json, found {digests[other]}"
        for path, other in ((two, three), (three, two))
    ]
    shutil.copytree(job.home / "model", output, dirs_exist_ok=True)
    for name in ("model-00004-of-00003.safetensors", "pytorch_model.bin", "adapter_config.json"):
        (output / name).write_bytes(b"")
        assert lines(output) == [
            f"{output / name}: expected no such file by streamer.json, found one"
        ]
        (output / name).unlink()
    for name in ("notes.txt", "optimizer.bin"):
        (output / name).write_bytes(b"one's own")
    (output / "README.md").unlink()
    assert lines(output, job.base, job.adapter, sample="all") == []


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"schema": "streamer.output/2"}'])
def test_a_malformed_record_is_reported(job: Job, tmp_path: Path, text: str) -> None:
    output = job.copy("adapter", tmp_path)
    (output / "streamer.json").write_text(text)
    (line,) = lines(output)
    assert line.startswith(
        f"{output / 'streamer.json'}: expected a file with the SHA-256 that it states, found "
    )


def test_a_record_of_another_schema(job: Job, tmp_path: Path) -> None:
    """One that a later version wrote, with a digest that is right, is refused; keys that it adds are ignored."""
    output = job.copy("adapter", tmp_path)
    edit_record(output, lambda tree: tree.update(later=[1]))
    assert lines(output, job.base, job.adapter) == []
    edit_record(output, lambda tree: tree.update(schema="streamer.output/3"))
    with pytest.raises(
        streamer.StreamerError, match="verify it with the version that wrote it"
    ) as e:
        streamer.verify_output(output)
    assert e.value.exit_code == 3


# What only recomputing finds, where every digest is right ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("method", ["paper", "project", "shrink"])
def test_another_lambda_than_recorded_is_reported(
    job: Job, tmp_path: Path, kind: str, method: Any
) -> None:
    write = (
        streamer.merge_with_reduced_intruder_dimensions
        if kind == "model"
        else streamer.reduce_intruder_dimension
    )
    write(job.base, job.adapter, tmp_path / kind, method=method, mitigation_lambda=0.5)
    assert lines(tmp_path / kind, job.base, job.adapter, sample="all") == []
    edit_record(tmp_path / kind, lambda tree: tree.update({"lambda": 0.55}))
    found = lines(tmp_path / kind, job.base, job.adapter, sample="all")
    assert len(found) >= 6
    assert all(" within one rounding, found " in line for line in found)


def test_other_intruders_than_recorded_are_reported(job: Job, tmp_path: Path) -> None:
    output = job.copy("model", tmp_path)
    one, other = json.loads((output / "streamer.json").read_text())["matrices"][:2]

    def change(tree: dict[str, Any]) -> None:
        tree["matrices"][0]["intruders"] = []
        tree["matrices"][1]["intruders"].append(max(other["intruders"]) + 1)

    edit_record(output, change)
    found = lines(output, job.base, job.adapter, sample="all")
    assert len(found) == 2
    assert all(any(row["tensor"] in line for line in found) for row in (one, other)), found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Outputs of a PEFT adapter that has factors, biases, a saved norm and trained tokens."""
    home = tmp_path_factory.mktemp("trained")
    LlamaForCausalLM(
        llama_config(attention_bias=True, tie_word_embeddings=False)
    ).bfloat16().save_pretrained(home / "base")
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        bias="all",
        modules_to_save=["model.norm"],
        trainable_token_indices={"embed_tokens": [3, 5]},
    )
    model = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(home / "base", dtype=torch.float32), lora
    )
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(home / "trained", save_embedding_layers=False)
    return make_all_outputs(home / "base", home / "trained", home)


CHANGES: dict[str, tuple[str, str, Callable[[torch.Tensor], Any], str]] = {
    "one value of a merged matrix": ("model", "model.layers.1.mlp.up_proj.weight",
                                     lambda t: t.view(torch.int16).view(-1)[t.abs().argmax()].add_(1), "expected W0 + Δ' within one"),
    "a norm": ("model", "model.layers.1.input_layernorm.weight", lambda t: t.mul_(2), "expected the base's bytes"),
    "a weight that has no row": ("model", "model.layers.0.self_attn.k_proj.weight", lambda t: t[0, 0].add_(1),
                                 "expected the base's bytes"),
    "another row of the embedding": ("model", "model.embed_tokens.weight", lambda t: t[7].mul_(1.01), "expected the inputs' values"),
    "a trained token": ("model", "model.embed_tokens.weight", lambda t: t[5].mul_(1.02), "expected the inputs' values"),
    "a bias": ("model", "model.layers.0.self_attn.q_proj.bias", lambda t: t.mul_(1.02), "expected the inputs' values"),
    "a saved module": ("model", "model.norm.weight", lambda t: t.mul_(1.02), "expected the inputs' values"),
    "a factor": ("adapter", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight", lambda t: t.mul_(1.01),
                 "expected the nearest factors to Δ' within one rounding, found"),
    "a saved module of an adapter": ("adapter", "base_model.model.model.norm.weight", lambda t: t.mul_(1.01),
                                     "expected the adapter's bytes"),
    "a bias of an adapter": ("adapter", "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", lambda t: t.mul_(1.01),
                             "expected the adapter's bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_tensor_is_reported(trained: Job, tmp_path: Path, name: str) -> None:
    kind, tensor, change, said = CHANGES[name]
    output = trained.copy(kind, tmp_path)
    (weights,) = output.glob("*.safetensors")
    edit_tensor(weights, tensor, change)
    agree(output, weights.name)
    assert lines(output) == []
    (line,) = lines(output, trained.base, trained.adapter, sample="all")
    where = weights
    if name == "a factor":  # a row is named by the base's tensor
        where = output
        tensor = tensor.removeprefix("base_model.model.").replace("lora_B.", "")
    assert line.startswith(f"{where}: tensor {tensor!r}: {said}"), line


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("model", "model.layers.1.input_layernorm.weight"),
        ("model", "model.layers.1.mlp.up_proj.weight"),
        ("adapter", "base_model.model.model.norm.weight"),
    ],
)
def test_missing_and_extra_tensors_are_reported(
    trained: Job, tmp_path: Path, kind: str, lost: str
) -> None:
    output = trained.copy(kind, tmp_path)
    (weights,) = output.glob("*.safetensors")
    tensors = load_file(weights)
    save_file(
        {"more.weight" if name == lost else name: t for name, t in tensors.items()},
        weights,
        {"format": "pt"},
    )
    agree(output, weights.name)
    found = lines(output, trained.base, trained.adapter, sample="all")
    assert sorted(line.split("'")[1] for line in found) == sorted([lost, "more.weight"]), found


def test_a_matrix_of_another_dtype_is_reported(trained: Job, tmp_path: Path) -> None:
    output = trained.copy("model", tmp_path)
    tensor = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(output / "model.safetensors")
    save_file(
        {**tensors, tensor: tensors[tensor].float()}, output / "model.safetensors", {"format": "pt"}
    )
    agree(output, "model.safetensors")
    (line,) = lines(output, trained.base, trained.adapter, sample="all")
    assert line.endswith(f"tensor {tensor!r}: expected BF16 [80, 48], found F32 [80, 48]")


@pytest.mark.parametrize(("key", "value"), [("lora_alpha", 16), ("use_rslora", True)])
def test_another_scaling_of_unchanged_factors(
    trained: Job, tmp_path: Path, key: str, value: object
) -> None:
    out = tmp_path / "out"
    streamer.reduce_intruder_dimension(trained.base, trained.adapter, out, mitigation_lambda=1.0)
    assert lines(out, trained.base, trained.adapter, sample="all") == []
    config = json.loads((out / "adapter_config.json").read_text()) | {key: value}
    (out / "adapter_config.json").write_text(json.dumps(config))
    agree(out, "adapter_config.json")
    found = lines(out, trained.base, trained.adapter, sample="all")
    assert len(found) == 4
    assert all(": expected the nearest factors to Δ' within" in line for line in found)


def test_factors_of_a_lower_rank_are_reported(trained: Job, tmp_path: Path) -> None:
    output = tmp_path / "out"
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight" for x in "BA"]
    streamer.reduce_intruder_dimension(
        trained.base, trained.adapter, output, method="shrink", mitigation_lambda=0.5, to_lora=2
    )
    assert lines(output, trained.base, trained.adapter, sample="all") == []
    tensors = load_file(output / "adapter_model.safetensors")
    U, S, Vh = torch.linalg.svd(tensors[names[0]] @ tensors[names[1]], full_matrices=False)
    tensors |= {names[0]: (U * S)[:, 1:2].contiguous(), names[1]: Vh[1:2].contiguous()}
    save_file(tensors, output / "adapter_model.safetensors", {"format": "pt"})
    agree(output, "adapter_model.safetensors")
    (line,) = lines(output, trained.base, trained.adapter, sample="all")
    assert "expected the nearest factors to Δ' within one rounding, found " in line


def test_rows_struck_from_a_record_are_reported(trained: Job, tmp_path: Path) -> None:
    """The weights are the base's there, as if the adapter had not been merged."""
    output = trained.copy("model", tmp_path)
    tensor = "model.layers.0.self_attn.q_proj.weight"
    base = load_file(trained.base / "model.safetensors")[tensor]
    edit_tensor(output / "model.safetensors", tensor, lambda t: t.copy_(base))
    edit_record(
        output,
        lambda tree: tree.update(matrices=[m for m in tree["matrices"] if m["tensor"] != tensor]),
    )
    agree(output, "model.safetensors")
    words = "expected a row for 'model.layers.0.self_attn.q_proj', which the adapter changes, found none"
    assert lines(output, trained.base, trained.adapter) == [f"{output / 'streamer.json'}: {words}"]

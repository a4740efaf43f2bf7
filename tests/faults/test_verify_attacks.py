"""What someone changed in an output on purpose, with every digest made right again: `verify --sample all` finds each change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from attacks import Attack, Output, config, found, make_right, record, tensor, together, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from verified import Job, edit_record, edit_tensor, lines, make_all_outputs, reseal

import streamer

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
FIRST, ROW = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Outputs of a PEFT adapter that has factors, biases, a saved norm and trained tokens."""
    home = tmp_path_factory.mktemp("attacks")
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, attention_bias=True,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(home / "base")
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], bias="all", modules_to_save=["model.norm"],
                           trainable_token_indices={"embed_tokens": [3, 5]})  # fmt: skip
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(home / "base", dtype=torch.float32), lora)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(home / "trained", save_embedding_layers=False)
    return make_all_outputs(home / "base", home / "trained", home)


def exchange(one: str, other: str) -> Callable[[Output, Job], None]:
    def attack(output: Output, job: Job) -> None:
        tensors = load_file(weights(output))
        held = tensors[one].clone()
        edit_tensor(weights(output), one, lambda t: t.copy_(tensors[other]))
        edit_tensor(weights(output), other, lambda t: t.copy_(held))

    return attack


def without_rows(struck: Callable[[dict[str, Any]], bool]) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        tree["matrices"] = [row for row in tree["matrices"] if not struck(row)]

    return change


def bases_weights(output: Output, job: Job) -> None:
    """Exchange every weight for the base's: the output is the base."""
    base = load_file(job.base / "model.safetensors")
    with safe_open(weights(output), "pt") as f:
        metadata = f.metadata()
    save_file(base, weights(output), metadata)


def retyped(name: str, dtype: torch.dtype | None) -> Attack:
    """Write other values of another dtype in a tensor's place, or nothing."""

    def attack(output: Output, job: Job) -> None:
        tensors = load_file(weights(output))
        with safe_open(weights(output), "pt") as f:
            metadata = f.metadata()
        old = tensors.pop(name)
        save_file(tensors if dtype is None else {**tensors, name: 2 * old.to(dtype)}, weights(output), metadata)

    return attack


def undecided(output: Output, job: Job) -> None:
    """Say that no decision is certified and that there is no intruder, and write ``W0 + Δ`` unmitigated."""
    import streamer

    plain = output.parent / "plain"
    streamer.merge_with_reduced_intruder_dimensions(job.base, job.adapter, plain, mitigation_lambda=1.0)
    held = load_file(plain / "model.safetensors")
    with safe_open(weights(output), "pt") as f:
        metadata = f.metadata()
    save_file(held, weights(output), metadata)
    norms = {row["tensor"]: row for row in json.loads((plain / "streamer.json").read_text())["matrices"]}

    def change(tree: dict[str, Any]) -> None:
        for row in tree["matrices"]:
            row |= {"intruders": [], "certified": False, "delta_norm_after": norms[row["tensor"]]["delta_norm_after"]}

    edit_record(output, change)


ATTACKS = {
    "a norm doubled": ("model", tensor("layers.1.input_layernorm.weight", lambda t: t.mul_(2)),
                       "tensor 'model.layers.1.input_layernorm.weight': expected the base's bytes"),
    "noise in a weight that has no row": ("model", tensor("layers.0.self_attn.k_proj.weight", lambda t: t.normal_()),
                                          "tensor 'model.layers.0.self_attn.k_proj.weight': expected the base's bytes"),
    "the head and the embedding exchanged": ("model", exchange(HEAD, EMBEDDING), f"tensor {HEAD!r}: expected the base's bytes"),
    "another row of the embedding": ("model", tensor(EMBEDDING, lambda t: t[7].mul_(1.01)), f"tensor {EMBEDDING!r}: expected "),
    "a trained token": ("model", tensor(EMBEDDING, lambda t: t[5].mul_(1.02)), f"tensor {EMBEDDING!r}: expected "),
    "a bias": ("model", tensor(BIAS, lambda t: t.mul_(1.02)), f"tensor {BIAS!r}: expected "),
    "a saved module": ("model", tensor("model.norm.weight", lambda t: t.mul_(1.02)), f"tensor {NORM!r}: expected "),
    "a saved module struck from the record": (
        "model",
        together(
            record(lambda tree: tree.update(carried=[c for c in tree["carried"] if c["tensor"] != NORM])),
            lambda output, job: edit_tensor(weights(output), NORM, lambda t: t.copy_(load_file(job.base / "model.safetensors")[NORM])),
        ),
        "model.norm.weight",
    ),
    "an untouched tensor in the record's list": (
        "model",
        together(
            record(lambda tree: tree["carried"].append({"tensor": HEAD, "change": "replaced", "by": "base_model.model.model.norm.weight"})),
            tensor(HEAD, lambda t: t.mul_(2)),
        ),
        f"tensor {HEAD!r}: expected ",
    ),
    "rows struck and noise in their weights": (
        "model",
        together(record(without_rows(lambda row: "q_proj" in row["tensor"])), tensor(ROW, lambda t: t.normal_())),
        "expected a row for 'model.layers.0.self_attn.q_proj', which the adapter changes, found none",
    ),
    "all rows struck and the base's weights": (
        "model",
        together(record(without_rows(lambda row: True)), record(lambda tree: tree.update(carried=[])), bases_weights),
        "model.layers.0.self_attn.q_proj",
    ),
    "a row twice": ("model", record(lambda tree: tree["matrices"].append(tree["matrices"][0])), f"tensor {FIRST!r}: expected one "),
    "a row of another module": (
        "model",
        record(lambda tree: tree["matrices"][0].update(module="model.layers.1.self_attn.q_proj")),
        f"tensor {FIRST!r}: expected ",
    ),
    "a row of another tensor": (
        "model",
        together(record(lambda tree: tree["matrices"][0].update(tensor=f"{NORM}[0]")), tensor(NORM, lambda t: t.mul_(2))),
        f"tensor '{NORM}[0]': expected a row of the adapter's module that changes it",
    ),
    "no decision certified, and no intruders": ("model", undecided, "to be an intruder"),
    "rope_theta": ("model", config("config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
                   "config.json: expected rope_parameters.rope_theta 10000.0"),
    "tied in the config": ("model", config("config.json", tie_word_embeddings=True),
                           "config.json: expected tie_word_embeddings false"),
    "a key that is not the base's": ("model", config("config.json", attention_multiplier=2.0),
                                     "config.json: expected attention_multiplier "),
    "a norm of another dtype, as if it had been quantized": (
        "model",
        together(record(lambda tree: tree.update(dequantize=True)), retyped("model.layers.1.input_layernorm.weight", torch.float32)),
        "tensor 'model.layers.1.input_layernorm.weight': expected a tensor of the base",
    ),
    "a norm taken out, as if it had been quantized": (
        "model",
        together(record(lambda tree: tree.update(dequantize=True)), retyped("model.layers.1.input_layernorm.weight", None)),
        "tensor 'model.layers.1.input_layernorm.weight': expected the base's tensor, found none",
    ),
    "generation_config.json": ("model", config("generation_config.json", bos_token_id=9), "generation_config.json: expected "),
    "use_dora": ("adapter", config("adapter_config.json", use_dora=True), "adapter_config.json: expected use_dora false"),
    "fan_in_fan_out": ("adapter", config("adapter_config.json", fan_in_fan_out=True), "adapter_config.json: expected fan_in_fan_out "),
    "target_modules": ("adapter", config("adapter_config.json", target_modules=["q_proj"]), "adapter_config.json: expected target_mod"),
    "a saved module of an adapter": ("adapter", tensor("model.norm.weight", lambda t: t.mul_(1.01)), "model.norm.weight': expected "),
    "a bias of an adapter": ("adapter", tensor("layers.0.self_attn.q_proj.base_layer.bias", lambda t: t.mul_(1.01)), "bias': expected "),
    "tokens of an adapter": ("adapter", tensor("trainable_tokens_delta", lambda t: t.mul_(1.01)), "trainable_tokens_delta': expected "),
    "rows struck from an adapter's record": (
        "adapter",
        together(record(without_rows(lambda row: "q_proj" in row["tensor"])),
                 tensor("layers.0.self_attn.q_proj.lora_B.weight", lambda t: t.normal_())),
        "model.layers.0.self_attn.q_proj",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_change_with_every_digest_right(job: Job, tmp_path: Path, name: str) -> None:
    kind, attack, said = ATTACKS[name]
    told = found(job.copy(kind, tmp_path), job, attack)
    assert any(said in line for line in told), told


def first_row(**values: Any) -> Attack:
    return record(lambda tree: tree["matrices"][0].update(values))


CONTRADICTIONS = {
    "an intruder twice": (first_row(intruders=[1, 1]), f"tensor {FIRST!r}: expected rising ranks of intruders"),
    "a rank below the first": (first_row(intruders=[-1]), f"tensor {FIRST!r}: expected rising ranks of intruders"),
    "two intruders, and only the first scaled": (
        together(first_row(intruders=[0, 1]), record(lambda tree: tree.update(scale="first"))),
        f"tensor {FIRST!r}: expected rising ranks of intruders, 1 at most",
    ),
    "a method without its detection": (record(lambda tree: tree.update(detection=None)), "expected method, lambda, detection and scale "),
    "an unknown method": (record(lambda tree: tree.update(method="other")), "expected method, lambda, detection and scale "),
    "no lambda": (record(lambda tree: tree.update({"lambda": None})), "expected method, lambda, detection and scale "),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_record_that_contradicts_itself(job: Job, tmp_path: Path, name: str) -> None:
    attack, said = CONTRADICTIONS[name]
    output = job.copy("model", tmp_path)
    attack(output, job)
    make_right(output)
    told = lines(output)
    assert any(said in line for line in told), told


def test_an_intruder_beyond_those_that_are_judged(job: Job, tmp_path: Path) -> None:
    told = found(job.copy("model", tmp_path), job, first_row(intruders=[40]))
    assert any(
        f"tensor {FIRST!r}: expected intruders among the first 10 directions, found [40]" in line for line in told
    ), told


@pytest.mark.parametrize("rank", [2, 0.9])
def test_factors_of_a_lower_rank_than_was_asked_for(job: Job, tmp_path: Path, rank: float) -> None:
    output, module = tmp_path / "out", "model.layers.0.self_attn.q_proj"

    def attack(output: Output, job: Job) -> None:
        tensors, path = load_file(weights(output)), weights(output)
        a, b = (f"base_model.model.{module}.lora_{letter}.weight" for letter in "AB")
        B, S, A = torch.linalg.svd(tensors[b] @ tensors[a], full_matrices=False)
        norm, whole = float(S[0]), float(S.norm())
        with safe_open(path, "pt") as f:
            metadata = f.metadata()
        save_file(tensors | {a: A[:1].contiguous(), b: B[:, :1] * norm}, path, metadata)
        tree = json.loads((output / "adapter_config.json").read_text())
        patterns = {key: tree.get(key, {}) | {module: 1} for key in ("rank_pattern", "alpha_pattern")}
        config("adapter_config.json", **patterns)(output, job)

        def change(tree: dict[str, Any]) -> None:
            row = next(row for row in tree["matrices"] if row["tensor"] == ROW)
            full = whole / (1 - row["dropped"] ** 2) ** 0.5
            row |= {"delta_norm_after": norm, "dropped": max(0.0, 1 - (norm / full) ** 2) ** 0.5}

        edit_record(output, change)

    streamer.reduce_intruder_dimension(
        job.base, job.adapter, output, method="shrink", mitigation_lambda=0.5, to_lora=rank
    )
    told = found(output, job, attack)
    assert any(
        f"tensor {ROW!r}: expected {'factors of rank 2' if rank == 2 else '0.9 of the energy'}" in line for line in told
    ), told


def edit_findings(path: Path, tensor: str, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Change the entry and the arrays of one matrix, and make the digest right."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors, tree = load_file(path), json.loads(metadata["findings"])
    row = next(row for row in tree["matrices"] if row["tensor"] == tensor)
    mine = {name.rpartition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{tensor}/")}
    change(row, mine)
    if not mine:
        tree["matrices"].remove(row)
    others = {name: t for name, t in tensors.items() if not name.startswith(f"{tensor}/")}
    held = others | {f"{tensor}/{key}": t.contiguous() for key, t in mine.items()}
    save_file(held, path, metadata | {"findings": json.dumps(tree)})
    reseal(path)


def no_intruders(row: dict[str, Any], arrays: dict[str, torch.Tensor]) -> None:
    row |= {"certified": False, "intruder_energy": 0.0, "dropped_at_zero": 0.0}
    arrays |= {
        "U": arrays["U"][:, :0],
        "S": arrays["S"][:0],
        "Vh": arrays["Vh"][:0],
        "intruders": arrays["intruders"][:0],
    }


def open_intervals(row: dict[str, Any], arrays: dict[str, torch.Tensor]) -> None:
    no_intruders(row, arrays)
    arrays |= {"similarity_low": arrays["similarity"] * 0, "similarity": arrays["similarity"] * 0 + 1,
               "similarity_high": arrays["similarity"] * 0 + 1}  # fmt: skip


def other_similarities(row: dict[str, Any], arrays: dict[str, torch.Tensor]) -> None:
    j = arrays["similarity"].argmax()
    for key in ("similarity_low", "similarity", "similarity_high"):
        arrays[key][j] -= 0.05


IN_FINDINGS: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], bool, str]] = {
    "no intruders, not certified": (no_intruders, True, "expected intruders ["),
    "not certified": (lambda row, arrays: row.update(certified=False), True, "expected certified true, by its intervals, found false"),
    "a similarity outside of its interval": (lambda row, arrays: arrays["similarity"].neg_(), True, "in its interval, found ["),
    "intervals that leave all open": (open_intervals, False, "expected direction 0 to be an intruder, found a decision against"),
    "similarities that are not the base's": (other_similarities, False, "expected similarities within their intervals as"),
    "a row struck": (lambda row, arrays: arrays.clear(), False, "expected a row for 'model.layers.0.self_attn.q_proj', which the adapter"),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_FINDINGS)
def test_changed_findings_with_a_right_digest(job: Job, tmp_path: Path, name: str) -> None:
    change, alone, said = IN_FINDINGS[name]
    path = job.copy("findings.safetensors", tmp_path)
    assert lines(path, job.base, job.adapter, sample="all") == []
    edit_findings(path, ROW, change)
    told = lines(path) if alone else lines(path, job.base, job.adapter, sample="all")
    assert any(line.startswith(f"{path}: ") and said in line for line in told), told
    assert alone or lines(path) == []

"""The whole job on a small generated model with planted intruders, in a directory of the caller's.

The base has a power-law spectrum, as trained weights have; the adapter holds, in some modules, a direction that is orthogonal
to nothing and near to nothing in the base, and large enough to come among the first singular directions: an intruder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer.api import detect_intruder_dimensions, merge_with_reduced_intruder_dimensions, reduce_intruder_dimension
from streamer.encodings import as_bytes
from streamer.events import Monitor
from streamer.findings import load_findings
from streamer.report import table
from streamer.storage.atomic import Buffer, write_atomic
from streamer.storage.checkpoint import INDEX_NAME, open_checkpoint
from streamer.storage.header import TensorInfo
from streamer.storage.shards import index_bytes, plan_shard, write_shard

HIDDEN, LAYERS, VOCAB, RANK, ALPHA = 192, 4, 512, 4, 8
PLANTED = {"self_attn.q_proj": 1, "self_attn.o_proj": 2, "mlp.down_proj": 1}
"""Intruders planted in each layer's modules; the adapter's other modules get none."""

SIGMA = (1.4, 0.8)
"""Their singular values: well apart from the base's own 1, 0.616, 0.463, …; near one of these they would mix with it."""


@dataclass(frozen=True)
class DemoModel:
    """Where the generated base and adapter are, and what was planted: intruders by base tensor."""

    base: Path
    adapter: Path
    planted: dict[str, int]


def power_law(shape: tuple[int, int], generator: torch.Generator, decay: float = 0.7) -> Tensor:
    """A random matrix with singular values ``j^-decay``, (m, n) float32."""
    p = min(shape)
    U = torch.linalg.qr(torch.randn(shape[0], p, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(shape[1], p, generator=generator)).Q
    W: Tensor = (U * torch.arange(1, p + 1).pow(-decay)) @ V.T
    return W


def make_demo(directory: Path, seed: int = 0) -> DemoModel:
    """Write a Llama-shaped base in two shards and a LoRA adapter for all its linear layers."""
    g = torch.Generator().manual_seed(seed)
    base, adapter = directory / "base", directory / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    inner = 2 * HIDDEN
    shapes = {f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"} | {
        "mlp.gate_proj": (inner, HIDDEN), "mlp.up_proj": (inner, HIDDEN), "mlp.down_proj": (HIDDEN, inner),
    }  # fmt: skip
    shards: list[dict[str, Tensor]] = [{}, {}]
    shards[0]["model.embed_tokens.weight"] = 0.02 * torch.randn(VOCAB, HIDDEN, generator=g)
    factors: dict[str, Tensor] = {}
    planted: dict[str, int] = {}
    for layer in range(LAYERS):
        for name, (m, n) in shapes.items():
            module = f"model.layers.{layer}.{name}"
            shards[layer * 2 // LAYERS][f"{module}.weight"] = power_law((m, n), g)
            # A trained adapter leans on what the base does already; here that part is small and random.
            A, B = torch.randn(RANK, n, generator=g) / n**0.5, 0.05 * torch.randn(m, RANK, generator=g) / m**0.5
            for j in range(PLANTED.get(name, 0)):
                u = torch.randn(m, generator=g)
                B[:, j] = u / u.norm() * SIGMA[j] * RANK / ALPHA / A[j].norm()
            if name in PLANTED:
                planted[f"{module}.weight"] = PLANTED[name]
            factors[f"base_model.model.{module}.lora_A.weight"] = A
            factors[f"base_model.model.{module}.lora_B.weight"] = B
        shards[layer * 2 // LAYERS][f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(HIDDEN)
    shards[1]["model.norm.weight"] = torch.ones(HIDDEN)
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _save(base / name, {k: t.to(torch.bfloat16) for k, t in tensors.items()}, "BF16")
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(t.numel() * 2 for tensors in shards for t in tensors.values())
    write_atomic(base / INDEX_NAME, index_bytes({"weight_map": weight_map}, total))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": inner,
              "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": VOCAB, "tie_word_embeddings": True,
              "torch_dtype": "bfloat16"}  # fmt: skip
    write_atomic(base / "config.json", json.dumps(config, indent=2).encode())
    _save(adapter / "adapter_model.safetensors", factors, "F32")
    lora = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted({n.split(".")[1] for n in shapes}),
            "bias": "none", "fan_in_fan_out": False, "task_type": "CAUSAL_LM", "base_model_name_or_path": "demo"}  # fmt: skip
    write_atomic(adapter / "adapter_config.json", json.dumps(lora, indent=2).encode())
    return DemoModel(base, adapter, planted)


def _save(path: Path, tensors: dict[str, Tensor], dtype: str) -> None:
    plan = plan_shard(path.name, [(name, dtype, tuple(t.shape)) for name, t in tensors.items()], {"format": "pt"})

    def source(info: TensorInfo) -> Iterator[Buffer]:
        yield as_bytes(tensors[info.name])

    write_shard(path.parent, plan, source, lambda _size, _sha256: None)


def run_demo(directory: Path, mitigation_lambda: float, monitor: Monitor) -> dict[str, Any]:
    """Detect, mitigate, merge, and detect again on what is left of the adapter.

    Returns
    -------
    dict
        ``matrices``: for each base tensor with a planted or found intruder the numbers planted, found and left, and the largest
        intruder's singular value before and after; ``totals``; and where everything stands.
    """
    model = make_demo(directory)
    findings_path, adapter_path, merged_path = (
        directory / "findings.safetensors",
        directory / "mitigated",
        directory / "merged",
    )
    found = detect_intruder_dimensions(model.base, model.adapter, findings_path, monitor=monitor)
    findings = load_findings(findings_path)
    reduce_intruder_dimension(model.base, model.adapter, adapter_path, findings=findings, monitor=monitor,
                              mitigation_lambda=mitigation_lambda)  # fmt: skip
    merge_with_reduced_intruder_dimensions(model.base, model.adapter, merged_path, findings=findings, monitor=monitor,
                                           mitigation_lambda=mitigation_lambda)  # fmt: skip
    open_checkpoint(merged_path)  # a strict reader takes the result
    left = detect_intruder_dimensions(model.base, adapter_path, monitor=monitor).by_tensor
    rows: list[dict[str, Any]] = []
    for m in found:
        planted, ranks = model.planted.get(m.tensor, 0), m.detection.intruders
        if planted or ranks:
            after = left[m.tensor].detection
            rows.append({
                "tensor": m.tensor, "planted": planted, "found": len(ranks), "left": len(after.intruders),
                "sigma_before": m.detection.singular_values[ranks[0]] if ranks else None,
                "sigma_after": after.singular_values[after.intruders[0]] if after.intruders else None,
            })  # fmt: skip
    keys = ("planted", "found", "left")
    return {
        "schema": "streamer.demo/1",
        "lambda": mitigation_lambda,
        "totals": {"matrices": len(found)} | {k: sum(r[k] for r in rows) for k in keys},
        "matrices": rows,
        "directory": str(directory),
    }


def demo_table(result: dict[str, Any]) -> str:
    """The demo's result for people."""

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    rows = [[r["tensor"], str(r["planted"]), str(r["found"]), str(r["left"]), number(r["sigma_before"]), number(r["sigma_after"])]
            for r in result["matrices"]]  # fmt: skip
    t = result["totals"]
    rows.append([f"all {t['matrices']} matrices", str(t["planted"]), str(t["found"]), str(t["left"]), "", ""])
    head = ["matrix", "planted", "found", "left", "sigma before", "sigma after"]
    return (
        table(head, rows, left=1)
        + f"\n\nlambda {result['lambda']}: an intruder keeps that share of its singular value; those still among the ten largest "
        "count as left"
    )

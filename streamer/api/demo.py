"""Run detection, mitigation and merging on a small generated model, shaped like a Llama, with planted intruders.

The base has a power-law spectrum, like trained weights. In some modules, the adapter adds a random direction that resembles no singular
vector of the base, and is large enough to be among the first singular directions: an intruder.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import torch
from torch import Tensor

from streamer.adapters.adapter_config import CONFIG_NAME as ADAPTER_CONFIG
from streamer.adapters.adapter_config import WEIGHTS_NAME
from streamer.api.intruders import (
    detect_intruder_dimensions,
    merge_with_reduced_intruder_dimensions,
    reduce_intruder_dimension,
)
from streamer.api.tensors import write_safetensors
from streamer.detection.findings import load_findings
from streamer.detection.options import DetectionOptions
from streamer.errors import OutputExistsError
from streamer.events import Monitor
from streamer.json_types import Amount, Count, TensorName
from streamer.linalg.operators import LowRank
from streamer.methods import Project
from streamer.options import DemoOptions
from streamer.plan.name_matching import natural
from streamer.storage.atomic_file import index_bytes, write_atomic
from streamer.storage.checkpoint import INDEX_NAME, open_checkpoint, shard_names
from streamer.tables import Column

HIDDEN, LAYERS, VOCAB, RANK, ALPHA = 192, 4, 512, 4, 8
PLANTED = {"self_attn.q_proj": 1, "self_attn.o_proj": 2, "mlp.down_proj": 1}
"""Intruders planted in each layer, by module; other modules get none."""

LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (2 * HIDDEN, HIDDEN), "mlp.up_proj": (2 * HIDDEN, HIDDEN), "mlp.down_proj": (HIDDEN, 2 * HIDDEN),
}  # fmt: skip
"""Shapes of a layer's linear modules."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCAB, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}  # fmt: skip
LORA = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "fan_in_fan_out": False,
    "target_modules": sorted(name.partition(".")[2] for name in LINEARS), "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "generated", "peft_version": "0.21.2",
}  # fmt: skip

SIGMA = (1.4, 0.8)
"""Singular values of the intruders, well apart from the base's 1, 0.616, 0.463, …; close values would mix their directions."""


@dataclass(frozen=True)
class DemoModel:
    """Generated base and adapter, and the number of planted intruders by base tensor."""

    base: Path
    adapter: Path
    planted: dict[str, int]


def power_law(
    shape: tuple[int, int], generator: torch.Generator, decay: float = 0.7, top: int | None = None
) -> LowRank:
    """Make a random matrix with singular values ``j^-decay``, all or the first `top`, as float32 factors."""
    p = min(*shape, *(() if top is None else (top,)))
    U = torch.linalg.qr(torch.randn(shape[0], p, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(shape[1], p, generator=generator)).Q
    return LowRank(U * torch.arange(1, p + 1).pow(-decay), V)


def planted_factors(
    shape: tuple[int, int], rank: int, scaling: float, planted: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Make ``A`` (rank, n) and ``B`` (m, rank): `planted` intruders with singular values `SIGMA`, and a small random rest.

    In a trained adapter, the rest follows directions of the base; here it is small and random.
    """
    m, n = shape
    A, B = torch.randn(rank, n, generator=generator) / n**0.5, 0.05 * torch.randn(m, rank, generator=generator) / m**0.5
    for j in range(planted):
        u = torch.randn(m, generator=generator)
        B[:, j] = u / u.norm() * SIGMA[j] / scaling / A[j].norm()
    return A, B


def make_demo(directory: Path, seed: int = 0) -> DemoModel:
    """Write a Llama-shaped base in two shards and a LoRA adapter for all its linear layers."""
    g, base, adapter = torch.Generator().manual_seed(seed), directory / "base", directory / "adapter"
    weights = {"model.embed_tokens.weight": 0.02 * torch.randn(VOCAB, HIDDEN, generator=g)}
    factors: dict[str, Tensor] = {}
    planted: dict[str, int] = {}
    for i in range(LAYERS):
        for name, shape in LINEARS.items():
            module, count = f"model.layers.{i}.{name}", PLANTED.get(name, 0)
            weights[f"{module}.weight"] = power_law(shape, g).dense()
            A, B = planted_factors(shape, RANK, ALPHA / RANK, count, g)
            factors |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
            planted |= {f"{module}.weight": count} if count else {}
        weights |= {f"model.layers.{i}.{at}_layernorm.weight": torch.ones(HIDDEN) for at in ("input", "post_attention")}
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    names, weight_map = list(weights), dict[str, str]()
    half = names.index(f"model.layers.{LAYERS // 2}.self_attn.q_proj.weight")
    for file, part in zip(shard_names(2), (names[:half], names[half:]), strict=True):
        _write(base / file, {name: weights[name].bfloat16() for name in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(2 * weight.numel() for weight in weights.values())
    write_atomic(base / INDEX_NAME, index_bytes({"weight_map": weight_map}, total))
    write_atomic(base / "config.json", json.dumps(CONFIG, indent=2).encode())
    _write(adapter / WEIGHTS_NAME, factors)
    write_atomic(adapter / ADAPTER_CONFIG, json.dumps(LORA, indent=2).encode())
    return DemoModel(base, adapter, planted)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    entries = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    write_safetensors(path, entries, tensors.items(), metadata={"format": "pt"})


# fmt: off
class _DemoTotals(TypedDict):
    matrices: Annotated[Count, "Matrices that the adapter changes."]
    planted: Annotated[Count, "Intruders that the generated adapter was given."]
    found: Annotated[Count, "Intruders found."]
    left: Annotated[Count, "Intruders found in the mitigated adapter."]
    gone: Annotated[Count, "Intruders found before and not after."]

class DemoMatrix(TypedDict):
    """A matrix."""
    tensor: TensorName
    planted: Annotated[Count, "Intruders that the adapter was given in it."]
    found: Annotated[Count, "Intruders found."]
    left: Annotated[Count, "Intruders found in the mitigated adapter."]
    gone: Annotated[Count, "Intruders found before and not after."]
    sigma_before: Annotated[Amount | None, "Singular value of the largest intruder found; null if there is none."]
    sigma_after: Annotated[Amount | None, "The same in the mitigated adapter."]

DemoRecord = TypedDict("DemoRecord", {
    "schema": Literal["streamer.demo/1"],
    "lambda": Annotated[float, "Share of the adapter's part of an intruder to keep: 1 changes nothing, 0 removes it."],
    "totals": Annotated[_DemoTotals, "Sums over matrices."],
    "matrices": Annotated[list[DemoMatrix], "The matrices with a planted or found intruder."],
    "directory": Annotated[str | None, "Directory of all files, as given with --output; null without --output, when nothing is kept."],
})
DemoRecord.__doc__ = "What `streamer demo --json` prints."
# fmt: on


def demo_columns(result: DemoRecord) -> list[Column]:
    """Make the columns of a table of the demo's matrices."""

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    t, strength, top_k = result["totals"], result["lambda"], DetectionOptions().top_k
    rows = sorted(result["matrices"], key=lambda r: natural(r["tensor"]))
    counts: dict[Literal["planted", "found", "gone"], str] = {
        "planted": "intruders planted in this matrix",
        "found": f"intruders among the {top_k} largest directions, by `streamer detect`",
        "gone": f"no longer found in the adapter that `streamer mitigate --method project --lambda {strength:g}` wrote",
    }
    columns = [
        Column("matrix", [r["tensor"] for r in rows], left=True, names=True, foot=f"all {t['matrices']} matrices")
    ]
    for key, about in counts.items():
        columns.append(Column(key, [str(r[key]) for r in rows], about, priority=9, foot=str(t[key])))
    before = [number(r["sigma_before"]) for r in rows]
    columns.append(Column("sigma", before, "singular value of the largest one; the base's own largest is 1", 3))
    if t["left"]:
        after = [number(r["sigma_after"]) for r in rows]
        columns.append(
            Column("sigma left", after, "singular value of the largest one found in the new adapter; `-` if none", 5)
        )
    return columns


class DemoRequest(DemoOptions):
    """A requested demo; without an output, in a temporary directory."""

    def run(self, monitor: Monitor) -> DemoRecord:
        """Detect, mitigate, merge, and detect again in the mitigated adapter."""
        method = Project(self.mitigation_lambda, amplify=self.amplify)
        if self.output is None:
            with tempfile.TemporaryDirectory(prefix="streamer-demo-") as directory:
                return {**_run(Path(directory), method, monitor), "directory": None}
        output = Path(self.output)
        if os.path.lexists(output):
            raise OutputExistsError(f"{output}: exists; name a directory that does not", output)
        return _run(output, method, monitor)


def _run(directory: Path, mitigation: Project, monitor: Monitor) -> DemoRecord:
    model = make_demo(directory)
    findings_path, adapter_path, merged_path = (
        directory / name for name in ("findings.safetensors", "mitigated", "merged")
    )
    found = detect_intruder_dimensions(model.base, model.adapter, findings_path, monitor=monitor)
    findings = load_findings(findings_path)
    lam = mitigation.mitigation_lambda
    same: Any = {"findings": findings, "monitor": monitor, "mitigation_lambda": lam, "method": mitigation.name,
                 "amplify": mitigation.amplify}  # fmt: skip
    reduce_intruder_dimension(model.base, model.adapter, adapter_path, **same)
    merge_with_reduced_intruder_dimensions(model.base, model.adapter, merged_path, **same)
    open_checkpoint(merged_path)  # a strict reader must accept the result
    left = detect_intruder_dimensions(model.base, adapter_path, monitor=monitor).by_tensor
    rows: list[DemoMatrix] = []
    for m in found:
        planted, ranks = model.planted.get(m.tensor, 0), m.detection.intruders
        if planted or ranks:
            after = left[m.tensor].detection
            rows.append({
                "tensor": m.tensor, "planted": planted, "found": len(ranks), "left": len(after.intruders),
                "gone": max(0, len(ranks) - len(after.intruders)),
                "sigma_before": m.detection.singular_values[ranks[0]] if ranks else None,
                "sigma_after": after.singular_values[after.intruders[0]] if after.intruders else None,
            })  # fmt: skip
    return {
        "schema": "streamer.demo/1",
        "lambda": lam,
        "totals": {"matrices": len(found), "planted": sum(r["planted"] for r in rows), "found": sum(r["found"] for r in rows),
                   "left": sum(r["left"] for r in rows), "gone": sum(r["gone"] for r in rows)},
        "matrices": rows,
        "directory": str(directory),
    }  # fmt: skip

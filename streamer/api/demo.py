"""Run detection, mitigation and merging on a small generated model with planted intruders.

Generate Llama-shaped models and LoRA adapters with planted intruders, piece by piece, of any size.

The base has a power-law spectrum, like trained weights. In some modules, the adapter adds a random direction that resembles no singular
vector of the base, and is large enough to be among the first singular directions: an intruder.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from streamer.errors import OutputExistsError
from streamer.events import Monitor
from streamer.json_types import Amount, Count, TensorName
from streamer.linalg.operators import LowRank
from streamer.methods import Project
from streamer.options import DemoOptions
from streamer.storage.atomic_file import Piece, index_bytes, plan_shard, write_atomic, write_shard
from streamer.storage.checkpoint import INDEX_NAME, open_checkpoint, shard_names
from streamer.storage.header import TensorInfo, tensor_nbytes
from streamer.weights.base import ENCODINGS, as_bytes

HIDDEN, LAYERS, VOCAB, RANK, ALPHA = 192, 4, 512, 4, 8
PLANTED = {"self_attn.q_proj": 1, "self_attn.o_proj": 2, "mlp.down_proj": 1}
"""Intruders planted in each layer, by module; other modules get none."""

SIGMA = (1.4, 0.8)
"""Singular values of the intruders, well apart from the base's 1, 0.616, 0.463, …; close values would mix their directions."""


@dataclass(frozen=True)
class DemoModel:
    """Generated base and adapter, and the number of planted intruders by base tensor."""

    base: Path
    adapter: Path
    planted: dict[str, int]


@dataclass(frozen=True)
class Llama:
    """Sizes of a Llama-shaped model, which determine its tensors and its config.

    Attributes
    ----------
    hidden, intermediate, layers, vocab, heads, kv_heads
        As in the config; hidden is a multiple of heads, and heads of kv_heads.
    tied
        Whether the embedding is also the output layer; if not, there is an ``lm_head``.
    """

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int
    tied: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """List the linear layers of one block: name to (out, in)."""
        h, inner, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (inner, h), "mlp.up_proj": (inner, h), "mlp.down_proj": (h, inner),
        }  # fmt: skip

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """List the linear layers of all blocks: path in the model to (out, in)."""
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in self.linears.items()}

    @property
    def targets(self) -> dict[str, list[str]]:
        """Make the entries of an adapter's config that name its targets: every linear layer."""
        return {"target_modules": sorted({name.rpartition(".")[2] for name in self.linears})}

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """List the tensors in file order: name to shape."""
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in self.linears.items()}
            out |= {f"model.layers.{i}.{at}_layernorm.weight": (self.hidden,) for at in ("input", "post_attention")}
        out["model.norm.weight"] = (self.hidden,)
        return out if self.tied else out | {"lm_head.weight": (self.vocab, self.hidden)}

    def nbytes(self, dtype: str) -> int:
        """Count the bytes of all tensors in this dtype."""
        return sum(tensor_nbytes(dtype, shape) for shape in self.tensors.values())

    def config(self, dtype: str) -> dict[str, Any]:
        """Make the model's ``config.json``."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
                "intermediate_size": self.intermediate, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab, "tie_word_embeddings": self.tied,
                "torch_dtype": str(ENCODINGS[dtype].dtype).removeprefix("torch.")}  # fmt: skip


def lora_shapes(model: Llama, rank: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """List the shapes of A and B for a LoRA adapter on every linear layer."""
    return {module: ((rank, n), (m, rank)) for module, (m, n) in model.modules.items()}


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


def write_base(
    directory: Path, model: Llama, dtype: str, shards: Sequence[Sequence[str]], rows: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write a base model: one file, or shards with their index, and the config, with one piece in memory at a time.

    Parameters
    ----------
    shards
        Names of the tensors in each file.
    rows
        Returns a tensor's values in consecutive pieces of whole rows, which are rounded to `dtype`.
    """
    directory.mkdir(parents=True)

    def source(info: TensorInfo) -> Iterator[Piece]:
        for piece in rows(info.name):
            yield Piece(as_bytes(piece.to(ENCODINGS[dtype].dtype)))

    shapes = model.tensors
    weight_map: dict[str, str] = {}
    for file, names in zip(shard_names(len(shards)), shards, strict=True):
        plan = plan_shard(file, [(name, dtype, shapes[name]) for name in names], {"format": "pt"})
        write_shard(directory, plan, ((info, source(info)) for info in plan.header.tensors))
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_atomic(directory / INDEX_NAME, index_bytes({"weight_map": weight_map}, model.nbytes(dtype)))
    write_atomic(directory / "config.json", json.dumps(model.config(dtype), indent=2).encode())


def write_adapter(
    directory: Path,
    targets: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[tuple[int, int], tuple[int, int]]],
    rank: int,
    alpha: float,
    factors: Callable[[str], tuple[Tensor, Tensor]],
) -> None:
    """Write a LoRA adapter as PEFT does.

    Parameters
    ----------
    targets
        Entries of the config that name its targets.
    shapes
        Shapes of ``lora_A`` and ``lora_B`` by module.
    factors
        Returns a module's A and B.
    """
    directory.mkdir(parents=True)
    sizes = {(module, which): size for module, pair in shapes.items() for which, size in zip("AB", pair, strict=True)}
    names = {key: f"base_model.model.{key[0]}.lora_{key[1]}.weight" for key in sizes}
    tensors = (
        (names[module, which], tensor) for module in shapes for which, tensor in zip("AB", factors(module), strict=True)
    )
    entries = [(names[key], "F32", size) for key, size in sizes.items()]
    write_safetensors(directory / WEIGHTS_NAME, entries, tensors, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "fan_in_fan_out": False, **targets,
              "task_type": "CAUSAL_LM", "base_model_name_or_path": "generated", "peft_version": "0.21.2"}  # fmt: skip
    write_atomic(directory / ADAPTER_CONFIG, json.dumps(config, indent=2).encode())


def make_demo(directory: Path, seed: int = 0) -> DemoModel:
    """Write a Llama-shaped base in two shards and a LoRA adapter for all its linear layers."""
    g = torch.Generator().manual_seed(seed)
    model = Llama(HIDDEN, 2 * HIDDEN, LAYERS, VOCAB, heads=4, kv_heads=4, tied=True)
    weights = {"model.embed_tokens.weight": 0.02 * torch.randn(VOCAB, HIDDEN, generator=g)}
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    planted: dict[str, int] = {}
    for module, shape in model.modules.items():
        count = PLANTED.get(".".join(module.split(".")[3:]), 0)
        weights[f"{module}.weight"] = power_law(shape, g).dense()
        factors[module] = planted_factors(shape, RANK, ALPHA / RANK, count, g)
        if count:
            planted[f"{module}.weight"] = count
    names = list(model.tensors)
    half = next(i for i, name in enumerate(names) if name.startswith(f"model.layers.{LAYERS // 2}."))
    base, adapter = directory / "base", directory / "adapter"
    write_base(base, model, "BF16", [names[:half], names[half:]],
               lambda name: [weights[name] if name in weights else torch.ones(model.tensors[name])])  # fmt: skip
    write_adapter(adapter, model.targets, lora_shapes(model, RANK), RANK, ALPHA, factors.__getitem__)
    return DemoModel(base, adapter, planted)


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

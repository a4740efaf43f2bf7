"""The whole job on a small generated model with planted intruders, in a directory of the caller's.

The base has a power-law spectrum, as trained weights have; the adapter holds, in some modules, a direction that is orthogonal
to nothing and near to nothing in the base, and large enough to come among the first singular directions: an intruder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamer.adapters.adapter import CONFIG_NAME as ADAPTER_CONFIG
from streamer.adapters.adapter import WEIGHTS_NAME
from streamer.api import detect_intruder_dimensions, merge_with_reduced_intruder_dimensions, reduce_intruder_dimension
from streamer.cli.layout import Column, Screen, fit, natural, table
from streamer.cli.tables import NO_LIMIT
from streamer.detection.findings import load_findings
from streamer.detection.options import DetectionOptions
from streamer.events import Monitor
from streamer.linalg.low_rank import LowRank
from streamer.storage.atomic_file import Buffer, write_atomic
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, open_checkpoint
from streamer.storage.header import TensorInfo, tensor_nbytes
from streamer.storage.shard_writer import index_bytes, plan_shard, write_shard
from streamer.weights.dtypes import ENCODINGS, as_bytes

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


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama-shaped model, and what follows from them: its tensors, its config.

    Attributes
    ----------
    hidden, intermediate, layers, vocab, heads, kv_heads
        As in the config; heads divide hidden, kv_heads divide heads.
    tied
        Whether the embedding is the output layer as well; if not there is an ``lm_head``.
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
        """The linear layers of one block: name to (out, in)."""
        h, inner, kv = self.hidden, self.intermediate, self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (inner, h), "mlp.up_proj": (inner, h), "mlp.down_proj": (h, inner),
        }  # fmt: skip

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Every linear layer of every block: path in the model to (out, in)."""
        return {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in self.linears.items()}

    @property
    def targets(self) -> dict[str, list[str]]:
        """What an adapter's config says that it wraps: every linear layer."""
        return {"target_modules": sorted({name.rpartition(".")[2] for name in self.linears})}

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor in file order: name to shape."""
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in self.linears.items()}
            out |= {f"model.layers.{i}.{at}_layernorm.weight": (self.hidden,) for at in ("input", "post_attention")}
        out["model.norm.weight"] = (self.hidden,)
        return out if self.tied else out | {"lm_head.weight": (self.vocab, self.hidden)}

    def nbytes(self, dtype: str) -> int:
        """Bytes of all tensors in this dtype."""
        return sum(tensor_nbytes(dtype, shape) for shape in self.tensors.values())

    def config(self, dtype: str) -> dict[str, Any]:
        """What stands in ``config.json``."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
                "intermediate_size": self.intermediate, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab, "tie_word_embeddings": self.tied,
                "torch_dtype": str(ENCODINGS[dtype].dtype).removeprefix("torch.")}  # fmt: skip


def lora_shapes(model: Llama, rank: int) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """The shapes of A and B of a LoRA adapter on every linear layer."""
    return {module: ((rank, n), (m, rank)) for module, (m, n) in model.modules.items()}


def power_law(
    shape: tuple[int, int], generator: torch.Generator, decay: float = 0.7, top: int | None = None
) -> LowRank:
    """A random matrix with singular values ``j^-decay``, all of them or the first `top`, in factors, float32."""
    p = min(*shape, *(() if top is None else (top,)))
    U = torch.linalg.qr(torch.randn(shape[0], p, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(shape[1], p, generator=generator)).Q
    return LowRank(U * torch.arange(1, p + 1).pow(-decay), V)


def planted_factors(
    shape: tuple[int, int], rank: int, scale: float, planted: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``A`` (rank, n) and ``B`` (m, rank): `planted` intruders of singular values `SIGMA`, and a small random rest.

    A trained adapter leans on what the base does already; here that part is small and random.
    """
    m, n = shape
    A, B = torch.randn(rank, n, generator=generator) / n**0.5, 0.05 * torch.randn(m, rank, generator=generator) / m**0.5
    for j in range(planted):
        u = torch.randn(m, generator=generator)
        B[:, j] = u / u.norm() * SIGMA[j] / scale / A[j].norm()
    return A, B


def write_base(
    directory: Path, model: Llama, dtype: str, shards: Sequence[Sequence[str]], rows: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write a base model: one file, or shards with their index, and the config. Memory is that of one piece.

    Parameters
    ----------
    shards
        The names of the tensors of each file.
    rows
        Gives a tensor's values in consecutive pieces of whole rows; they are rounded to `dtype`.
    """
    directory.mkdir(parents=True)

    def source(info: TensorInfo) -> Iterator[Buffer]:
        for piece in rows(info.name):
            yield as_bytes(piece.to(ENCODINGS[dtype].dtype))

    shapes = model.tensors
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = SINGLE_NAME if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write(directory / file, [(name, dtype, shapes[name]) for name in names], source)
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
        What its config says that it wraps.
    shapes
        The shapes of ``lora_A`` and ``lora_B`` by module.
    factors
        Gives a module's A and B.
    """
    directory.mkdir(parents=True)
    entries = [
        (f"base_model.model.{module}.lora_{which}.weight", "F32", shape)
        for module, pair in shapes.items()
        for which, shape in zip("AB", pair, strict=True)
    ]
    held: dict[str, Tensor] = {}

    def source(info: TensorInfo) -> Iterator[Buffer]:
        if info.name not in held:
            module = info.name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            A, B = factors(module)
            held[info.name], held[info.name.replace("lora_A", "lora_B")] = A, B
        yield as_bytes(held.pop(info.name))

    _write(directory / WEIGHTS_NAME, entries, source)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "fan_in_fan_out": False, **targets,
              "task_type": "CAUSAL_LM", "base_model_name_or_path": "generated", "peft_version": "0.21.2"}  # fmt: skip
    write_atomic(directory / ADAPTER_CONFIG, json.dumps(config, indent=2).encode())


def _write(path: Path, entries: Sequence[tuple[str, str, tuple[int, ...]]],
           source: Callable[[TensorInfo], Iterable[Buffer]]) -> None:  # fmt: skip
    write_shard(path.parent, plan_shard(path.name, entries, {"format": "pt"}), source, lambda _size, _sha256: None)


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


def run_demo(directory: Path, mitigation_lambda: float, monitor: Monitor) -> dict[str, Any]:
    """Detect, mitigate, merge, and detect again on what is left of the adapter.

    Returns
    -------
    dict
        ``matrices``: for each base tensor with a planted or found intruder the numbers planted, found, left and gone, and the largest
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
                "gone": max(0, len(ranks) - len(after.intruders)),
                "sigma_before": m.detection.singular_values[ranks[0]] if ranks else None,
                "sigma_after": after.singular_values[after.intruders[0]] if after.intruders else None,
            })  # fmt: skip
    keys = ("planted", "found", "left", "gone")
    return {
        "schema": "streamer.demo/1",
        "lambda": mitigation_lambda,
        "totals": {"matrices": len(found)} | {k: sum(r[k] for r in rows) for k in keys},
        "matrices": rows,
        "directory": str(directory),
    }


NEXT = """\
next: streamer inspect BASE ADAPTER   shows what would be done with yours, and
      streamer detect BASE ADAPTER -o findings.safetensors   finds its intruders"""


def demo_table(result: dict[str, Any], screen: Screen = NO_LIMIT) -> str:
    """The demo's result for people."""

    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.3f}"

    t, strength, top_k = result["totals"], result["lambda"], DetectionOptions().top_k
    rows = sorted(result["matrices"], key=lambda r: natural(r["tensor"]))
    counts = {
        "planted": "intruders that the generated adapter brings into this matrix",
        "found": f"intruders among the {top_k} largest directions, by `streamer detect`",
        "gone": f"no longer found in the adapter that `streamer mitigate --lambda {strength:g}` wrote",
    }
    columns = [
        Column("matrix", [r["tensor"] for r in rows], left=True, names=True, foot=f"all {t['matrices']} matrices")
    ]
    for key, about in counts.items():
        columns.append(Column(key, [str(r[key]) for r in rows], about, keep=9, foot=str(t[key])))
    before = [number(r["sigma_before"]) for r in rows]
    columns.append(Column("sigma", before, "singular value of the largest one; the base's own largest is 1", keep=3))
    if t["left"]:
        after = [number(r["sigma_after"]) for r in rows]
        columns.append(
            Column("sigma left", after, "the same of what is found in the new adapter, `-` where none is", keep=5)
        )
    meaning = (
        "lambda 0 removes an intruder"
        if strength == 0
        else f"lambda {strength:g}: an intruder keeps that share of its singular value"
    )
    told = f"{t['planted']} planted, {t['found']} found, {t['gone']} gone, {t['left']} left; {meaning}"
    return "\n\n".join((table(columns, screen.width), fit(told, screen.width), fit(NEXT, screen.width, 6)))

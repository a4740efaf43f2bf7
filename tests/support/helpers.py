"""Small checkpoints and adapters for the tests, written with the safetensors library, and digests of what stands on disk."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from seeds import vary

from streamer.detection.intruders import Detection, decide
from streamer.storage.atomic_file import ShardPlan, plan_shard
from streamer.storage.checkpoint import Checkpoint
from streamer.storage.header import Header

Factors = tuple[torch.Tensor, torch.Tensor]


def detect(*matrices_and_options: Any, **named: Any) -> Detection:
    """What `decide` finds in one matrix."""
    return decide(*matrices_and_options, **named).detection


def view(checkpoint: Checkpoint, name: str) -> memoryview:
    """The bytes of a checkpoint's tensor."""
    file, info = checkpoint.locate(name)
    return file.view(info)


def names(directory: Path) -> list[str]:
    """What a directory holds, hidden files too."""
    return sorted(p.name for p in directory.iterdir())


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as f:
        return f.metadata()


def sealed(raw: bytes) -> bytes:
    """The bytes of a file with a digest that fits them: someone changed it on purpose, or the test is of what comes before."""
    n = 8 + int.from_bytes(raw[:8], "little")
    try:
        stated = json.loads(raw[8:n])["__metadata__"]["sha256"].encode()
    except (AttributeError, KeyError, TypeError, ValueError):
        return raw
    blank = raw[:n].replace(stated, b"0" * len(stated), 1) + raw[n:]
    return (
        raw[:n].replace(stated, hashlib.sha256(blank).hexdigest().encode()[: len(stated)], 1)
        + raw[n:]
    )


def tampered(
    source: Path, to: Path, key: str, change: Callable[[dict, dict[str, torch.Tensor]], object]
) -> Path:
    """A copy of a sealed file, the JSON of a key of its metadata or its tensors changed, under a digest that fits."""
    said = metadata(source)
    tensors = load_file(source)
    change(tree := json.loads(said[key]), tensors)
    save_file(tensors, to, {**said, key: json.dumps(tree)})
    to.write_bytes(sealed(to.read_bytes()))
    return to


def stamp(path: Path) -> dict:
    """What a file says of the run that wrote it."""
    return json.loads(metadata(path)["streamer"])


def tree_digest(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by relative name; hidden files too."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def spectrum_matrix(m: int, n: int, sigma: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A random (m, n) float64 matrix with these singular values."""
    g = torch.Generator().manual_seed(vary(seed))
    p = min(m, n)
    U = torch.linalg.qr(torch.randn(m, p, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, p, generator=g, dtype=torch.float64)).Q
    return (U * sigma.double()) @ V.T


def power_law(m: int, n: int, seed: int = 0, decay: float = 0.7) -> torch.Tensor:
    """A random (m, n) float64 matrix with singular values ``j^-decay``."""
    return spectrum_matrix(
        m, n, torch.arange(1, min(m, n) + 1, dtype=torch.float64).pow(-decay), seed
    )


def intruding_factors(
    m: int, n: int, r: int, seed: int = 0, sigma: float = 0.8
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, n), B (m, r) float32 with one direction of singular value `sigma` and r − 1 small ones; scale 1."""
    g = torch.Generator().manual_seed(vary(seed + 1000))
    A = torch.randn(r, n, generator=g) / n**0.5
    B = 0.02 * torch.randn(m, r, generator=g) / m**0.5
    u = torch.randn(m, generator=g)
    B[:, 0] = sigma * u / u.norm() / A[0].norm()
    return A, B


def planted(
    m: int, n: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Factors]:
    """A base in `dtype`, and factors that plant just one intruder among its ten leading directions, by an SVD in float64.

    A random direction leans on some of the base's by chance: draws in which it does are left out.
    """
    for draw in itertools.count(seed, 100):
        W0, (A, B) = power_law(m, n, seed=draw).to(dtype), intruding_factors(m, n, r, seed=draw)
        before, after = (
            torch.linalg.svd(W.double(), full_matrices=False).U for W in (W0, W0.float() + B @ A)
        )
        if ((before.T @ after[:, :10]).abs().amax(0) < 0.5).sum() == 1:
            return W0, (A, B)
    raise AssertionError


def write_adapter(
    directory: Path,
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]],
    r: int,
    alpha: float | None = None,
    more: dict[str, torch.Tensor] | None = None,
    **config,
) -> Path:
    """A PEFT folder from module path → (A, B), and more tensors by their names."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = dict(more or {})
    for module, (A, B) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    tree = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": r if alpha is None else alpha,
        "bias": "none",
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(tree))
    return directory


def write_sharded(
    directory: Path, shards: list[dict[str, torch.Tensor]], config: dict | None = None
) -> Path:
    """A sharded checkpoint with its index."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    total = 0
    for i, tensors in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(
            {k: t.contiguous() for k, t in tensors.items()},
            directory / name,
            metadata={"format": "pt"},
        )
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    return directory


MODULES = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")


def like(name: str, header: Header) -> ShardPlan:
    """A plan of a file with the tensors, order and metadata of another."""
    return plan_shard(name, [(t.name, t.dtype, t.shape) for t in header.tensors], header.metadata)


def three_shards(
    directory: Path, dtype: torch.dtype = torch.bfloat16, hidden: int = 48
) -> tuple[Path, Path]:
    """A base of three layers in three shards, and an adapter with one intruder in each of its nine modules."""
    shards = []
    factors = {}
    for layer in range(3):
        tensors = {}
        for i, name in enumerate(MODULES):
            m, n = {"mlp.up_proj": (2 * hidden, hidden), "mlp.down_proj": (hidden, 2 * hidden)}.get(
                name, (hidden, hidden)
            )
            module = f"model.layers.{layer}.{name}"
            tensors[f"{module}.weight"], factors[module] = planted(m, n, 4, 10 * layer + i, dtype)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
        tensors[f"model.layers.{layer}.counter"] = torch.arange(5)
        shards.append(tensors)
    base = write_sharded(directory / "base", shards)
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    return base, write_adapter(directory / "adapter", factors, r=4)


def one_file(directory: Path) -> tuple[Path, Path]:
    """A base of one file, which is the commit point of what is merged from it, and its adapter."""
    tensors = {}
    factors = {}
    for i in range(3):
        tensors[f"layers.{i}.weight"] = power_law(24, 20, seed=i).float()
        factors[f"layers.{i}"] = intruding_factors(24, 20, 3, seed=i)
    (directory / "one").mkdir()
    save_file(
        tensors,
        directory / "one" / "model.safetensors",
        metadata={"format": "pt", "note": "the base's own"},
    )
    (directory / "one" / "README.md").write_text("---\nlicense: mit\n---\n# One\n")
    return directory / "one", write_adapter(
        directory / "few", factors, r=3, base_model_name_or_path="some/one"
    )

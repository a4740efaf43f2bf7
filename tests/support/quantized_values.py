"""Bases of given tensors on disk, opened as weights, and what decoding must give."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from seeds import vary

from streamer.storage.checkpoint import open_checkpoint
from streamer.weights.logical import WeightView, open_weights
from streamer.weights.model_config import ModelConfig

CPU = torch.device("cpu")


FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def base_of(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    quantization: dict | None = None,
    io: str = "mmap",
    metadata: dict[str, str] | None = None,
) -> WeightView:
    """A model of these tensors on disk."""
    directory.mkdir(exist_ok=True, parents=True)
    stated = metadata or {"format": "pt"}
    save_file(
        {k: t.contiguous() for k, t in tensors.items()},
        directory / "model.safetensors",
        metadata=stated,
    )
    config = {
        "model_type": "test",
        **({"quantization_config": quantization} if quantization else {}),
    }
    (directory / "config.json").write_text(json.dumps(config))
    return open_weights(open_checkpoint(directory, io), ModelConfig(config))


def assert_decodes(weights: WeightView, name: str, expected: torch.Tensor) -> None:
    """All of it, pieces of it at awkward places, and read ahead: the same bits."""
    weight = weights[name]
    assert name in weights
    assert weight.shape == tuple(expected.shape)
    assert weight.compute == torch.float32
    whole = weight.whole(CPU)
    assert whole.dtype == torch.float32
    assert torch.equal(whole, expected.float())
    assert torch.equal(weight.load().whole(CPU), whole)
    m = len(expected)
    for i, j in ((0, 1), (m - 1, m), (m // 3, m // 3 + 1), (1, m), (m // 3, 2 * m // 3)):
        assert torch.equal(weight.rows(i, j), expected[i:j].float().flatten(1))


def fp8(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(vary(seed))
    return (100 * torch.randn(shape, generator=g)).clamp(-448, 448).to(torch.float8_e4m3fn)


def scales(shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(vary(seed))) / 1000 + 1e-4


CODES = {
    "w.weight": torch.zeros(64, 96, dtype=torch.int8),
    "w.weight_scale": torch.ones(64, 1),
    "w.bias": torch.zeros(64),
}


def packed(**other: torch.Tensor) -> dict[str, torch.Tensor]:
    """64 inputs and 32 outputs of four bits, as GPTQ has them, but for what is given."""
    words = {
        "qweight": torch.zeros(8, 32, dtype=torch.int32),
        "qzeros": torch.zeros(1, 4, dtype=torch.int32),
    }
    return {f"w.{key}": t for key, t in {**words, "scales": torch.ones(1, 32), **other}.items()}


AWQ_WORDS = torch.zeros(64, 4, dtype=torch.int32)


BNB = {"quant_method": "bitsandbytes"}


def torchao(
    kind: str, qdata: torch.Tensor, data: dict, **parts: torch.Tensor
) -> tuple[dict, dict, dict[str, str]]:
    """Tensors, config and metadata of a weight of torchao."""
    stated = {"_type": kind, "_data": data, "_tensor_data_names": ["qdata", *parts]}
    tensors = {f"w._weight_{part}": t for part, t in {"qdata": qdata, **parts}.items()}
    return (
        tensors,
        {"quant_method": "torchao"},
        {"w.weight": json.dumps(stated), "tensor_names": '["w.weight"]'},
    )


HQQ = {
    "w.W_q": torch.zeros(96, 32, dtype=torch.uint8),
    "w.scale": torch.ones(192, 1, dtype=torch.bfloat16),
    "w.zero": torch.ones(192, 1, dtype=torch.bfloat16),
    "w.shape": torch.tensor([64, 96]),
    "w.packing": torch.tensor([*b"4bit_u8"], dtype=torch.uint8),
    "w.axis": torch.tensor(1, dtype=torch.int32),
    "w.group_size": torch.tensor(32, dtype=torch.int32),
}

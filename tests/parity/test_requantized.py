"""Merged weights in the codes of a 4-bit base: decoded by the format's own library, and rounded as GPTQ rounds with a dense C."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import quantized
import torch
import transformers
from bitsandbytes.functional import QuantState
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from pairs import merge, opened
from peft import LoraConfig, get_peft_model
from quantized import Quantized, Tensors, by_linear, floats_config, small_floats, write
from quantized_cases import all_tensors
from safetensors.torch import load_file, save_file
from seeds import vary
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import streamer
from streamer.errors import MismatchError, NumericError, UnsupportedError, UsageError


def mxfp4(directory: Path, plain: Path) -> Quantized:
    tensors, decoded = by_linear(plain, lambda t: small_floats(t, "mxfp4-pack-quantized"))
    return Quantized(
        write(directory, plain, tensors, floats_config("mxfp4-pack-quantized")), decoded
    )


def fp4(directory: Path, plain: Path) -> Quantized:
    """bitsandbytes' table of FP4 does not ascend."""
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    return quantized.by_bitsandbytes(directory, plain, options)


MAKERS = {
    **{name: quantized.MAKERS[name] for name in ("nf4", "packed", "nvfp4", "modelopt")},
    "fp4": fp4,
    "mxfp4": mxfp4,
}

BITSANDBYTES = ("nf4", "fp4")

CODES = {"nf4": ".weight", "fp4": ".weight", "modelopt": ".weight"}
"""The tensor of codes after the module's name; `.weight_packed` in compressed-tensors."""


def decode(encoding: str, stem: str, tensors: Tensors, codes: torch.Tensor) -> torch.Tensor:
    """What the library decodes, of these codes, float32."""
    parts = {
        key.removeprefix(f"{stem}."): t for key, t in tensors.items() if key.startswith(f"{stem}.")
    }
    if encoding in BITSANDBYTES:
        stored = {key.removeprefix("weight."): t for key, t in parts.items() if key != "weight"}
        state = QuantState.from_dict(stored, device="cpu")
        state.dtype = torch.float32
        return bnb.functional.dequantize_4bit(codes, state)
    if encoding == "packed":
        group = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
        scheme = QuantizationScheme(targets=["Linear"], weights=group)
        kept = {
            "weight_packed": codes,
            "weight_scale": parts["weight_scale"].float(),
            "weight_shape": parts["weight_shape"],
        }
        return PackedQuantizationCompressor.decompress(kept, scheme)["weight"]
    values = unpack_fp4_from_uint8(codes, len(codes), 2 * codes.shape[1], dtype=torch.float32)
    scale = parts["weight_scale"]
    scale = 2.0 ** (scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    scale = scale / parts["weight_global_scale"] if "weight_global_scale" in parts else scale
    scale = scale * parts["weight_scale_2"] if "weight_scale_2" in parts else scale
    return values * scale.repeat_interleave(values.shape[1] // scale.shape[1], 1)


def gptq(W: np.ndarray, candidates: np.ndarray, C: np.ndarray) -> np.ndarray:
    """Round (m, n) to candidates (m, n, codes) column by column, as GPTQ is published: the Cholesky factor of the inverse."""
    U, W, out = np.linalg.cholesky(np.linalg.inv(C)).T, W.copy(), np.empty_like(W)
    for j in range(W.shape[1]):
        nearest = np.abs(candidates[:, j] - W[:, j : j + 1]).argmin(1)
        out[:, j] = candidates[np.arange(len(W)), j, nearest]
        W[:, j:] -= ((W[:, j] - out[:, j]) / U[j, j])[:, None] * U[j, j:]
    return out


def moments(entry: Any) -> np.ndarray:
    """C of a map's entry, with at least a hundredth of the mean in each direction."""
    V = np.linalg.qr(entry.vectors.double().numpy().T)[0]
    n = entry.size
    values = entry.values.numpy()
    mean = entry.trace / entry.size
    rest = (entry.trace - values.sum()) / max(1, n - len(values))
    floor = max(rest, mean / 100)
    return (V * np.maximum(values, floor)) @ V.T + floor * (np.eye(n) - V @ V.T)


def shares(wanted: np.ndarray, made: np.ndarray, C: np.ndarray) -> tuple[float, float]:
    energy = np.trace(wanted @ C @ wanted.T)
    rest = made - wanted
    return np.trace(wanted @ C @ made.T) / energy, (np.trace(rest @ C @ rest.T) / energy) ** 0.5


def mapped(base: Path, place: Path) -> streamer.InputMap:
    ids = torch.randint(3, 64, (12, 12), generator=torch.Generator().manual_seed(vary(3)))
    np.save(place / "g.npy", ids.numpy())
    return streamer.map_inputs(
        base, general=place / "g.npy", vectors=24, on_event=lambda event: None
    )


def assert_rounded(
    name: str,
    before: np.ndarray,
    delta: np.ndarray,
    after: np.ndarray,
    candidates: np.ndarray,
    entry: Any,
    row: dict[str, Any],
) -> None:
    """As GPTQ rounds, but for rows in which two codes are as near; and the record says what is left of the update."""
    C = moments(entry)
    expected = gptq(before + delta, candidates, C)
    same = np.isclose(after, expected, rtol=1e-5, atol=1e-8 * np.abs(before).max()).all(1)
    assert same.mean() > 0.97, name
    survives, error = shares(delta, after - before, C)
    assert (row["survives"], row["rounding_error"]) == pytest.approx(
        (survives, error), rel=2e-3, abs=2e-3
    )


@pytest.mark.parametrize("encoding", MAKERS)
def test_codes_are_those_of_gptq_with_the_base_s_scales(
    encoding: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    made = MAKERS[encoding](tmp_path / "base", plain[0])
    adapter = plain[1]
    inputs = mapped(made.base, tmp_path)
    record = merge(made.base, adapter, tmp_path / "out", 1, requantize=inputs)
    rows = {row["tensor"]: row for row in record["matrices"]}
    before = all_tensors(made.base)
    after = all_tensors(tmp_path / "out")
    factors = load_file(adapter / "adapter_model.safetensors")
    changed = set()
    closer = 0
    for name, W in made.decoded.items():
        stem = name.removesuffix(".weight")
        key = stem + CODES.get(encoding, ".weight_packed")
        if encoding not in BITSANDBYTES:
            assert torch.equal(decode(encoding, stem, before, before[key]), W)
        decoded = decode(encoding, stem, before, before[key]).double().numpy()
        A, B = (factors[f"base_model.model.{stem}.lora_{x}.weight"].double().numpy() for x in "AB")
        delta = 2 * B @ A
        changed = changed | {key}
        each = (
            torch.full_like(before[key].view(torch.uint8), code * 17).view(before[key].dtype)
            for code in range(16)
        )
        candidates = np.stack(
            [decode(encoding, stem, before, codes).double().numpy() for codes in each], 2
        )
        got = decode(encoding, stem, after, after[key]).double().numpy()
        entry = inputs.find(name, delta.shape[1])
        assert_rounded(name, decoded, delta, got, candidates, entry, rows[name])
        at = np.abs(candidates - (decoded + delta)[..., None]).argmin(2)
        nearest = np.take_along_axis(candidates, at[..., None], 2)[..., 0]
        closer += rows[name]["rounding_error"] < shares(delta, nearest - decoded, moments(entry))[1]
    assert closer == len(made.decoded)
    for name, t in before.items():
        same = torch.equal(t.flatten().view(torch.uint8), after[name].flatten().view(torch.uint8))
        assert same == (name not in changed), name
    configs = [json.loads((at / "config.json").read_text()) for at in (made.base, tmp_path / "out")]
    assert configs[0] == configs[1]
    if encoding in BITSANDBYTES:  # the other bases lack what transformers asks of their libraries
        model = opened(
            AutoModelForCausalLM, tmp_path / "out", dtype=torch.float32, device_map="cpu"
        )
        for name, module in model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                stem = name.removesuffix(".weight")
                expected = decode(encoding, stem, after, after[f"{stem}.weight"])
                module.weight.quant_state.dtype = torch.float32
                assert torch.equal(
                    bnb.functional.dequantize_4bit(module.weight, module.weight.quant_state),
                    expected,
                )


def test_mxfp4_experts_are_coded_expert_by_expert(tmp_path: Path) -> None:
    """gpt-oss as it is published: codes by columns of the model's tensor."""
    torch.manual_seed(vary(0))
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
    )
    model = transformers.GptOssForCausalLM(config).bfloat16()
    stem = "model.layers.0.mlp.experts."
    tensors = {
        k: v for k, v in model.state_dict().items() if not k.endswith(("gate_up_proj", "down_proj"))
    }
    for name, (m, n) in {"gate_up_proj": (128, 32), "down_proj": (32, 64)}.items():
        tensors[f"{stem}{name}_blocks"] = torch.randint(256, (4, m, n // 32, 16)).byte()
        tensors[f"{stem}{name}_scales"] = torch.randint(117, 123, (4, m, n // 32)).byte()
    base = tmp_path / "base"
    config.save_pretrained(base)
    stated = json.loads((base / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "mxfp4"}
    }
    (base / "config.json").write_text(
        json.dumps({**stated, "architectures": ["GptOssForCausalLM"]})
    )
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )
    targets = [f"{stem}gate_up_proj", f"{stem}down_proj"]
    adapted = get_peft_model(
        model.float(), LoraConfig(r=4, target_modules=[], target_parameters=targets)
    )
    for key, p in adapted.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(p, std=0.03)
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = mapped(base, tmp_path)
    record = merge(base, tmp_path / "adapter", tmp_path / "out", 1, requantize=inputs)
    rows = {row["tensor"]: row for row in record["matrices"]}
    after = load_file(tmp_path / "out" / "model.safetensors")
    plain = dict(
        streamer.iter_merged(base, tmp_path / "adapter", mitigation_lambda=1.0, dequantize=True)
    )
    assert len(rows) == 8
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = (tensors[f"{stem}{name}_{end}"] for end in ("blocks", "scales"))
        each = (torch.full_like(blocks, code * 17) for code in range(16))
        candidates = np.stack(
            [convert_moe_packed_tensors(c, scales, dtype=torch.float64).numpy() for c in each], 3
        )
        old, new = (
            convert_moe_packed_tensors(t, scales, dtype=torch.float64).numpy()
            for t in (blocks, after[f"{stem}{name}_blocks"])
        )
        assert torch.equal(after[f"{stem}{name}_scales"], scales)
        for e in range(4):
            entry = inputs.find(f"{stem}{name}[{e}]", old.shape[1])
            sum_ = plain[f"{stem}{name}"][e].double().numpy()
            row = rows[f"{stem}{name}[{e}]"]
            C = moments(entry)
            delta = sum_ - old[e]
            expected = gptq((old[e] + delta).T, candidates[e].transpose(1, 0, 2), C).T
            # The sum above was rounded to bfloat16, so a few codes differ.
            assert (np.isclose(new[e], expected).mean()) > 0.9
            assert row["survives"] == pytest.approx(
                shares(delta.T, (new[e] - old[e]).T, C)[0], abs=0.05
            )
        loaded = opened(type(model), tmp_path / "out", dtype=torch.float32).get_parameter(
            f"{stem}{name}"
        )
        assert torch.equal(loaded.double(), torch.from_numpy(new))


REFUSALS: dict[
    str, tuple[Callable[[Path, Path], Quantized], dict[str, Any], type[Exception], str]
] = {
    "both": (MAKERS["nf4"], {"dequantize": True}, UsageError, "give one of them"),
    "int8": (quantized.MAKERS["int8"], {}, UnsupportedError, "stored in 4 bits"),
    "another base": (MAKERS["nf4"], {}, MismatchError, "is a map of another base"),
    "lacks": (MAKERS["packed"], {}, MismatchError, "has no inputs of 1 matrix"),
    "zeros": (MAKERS["packed"], {}, MismatchError, "has no inputs of 1 matrix"),
    "nan": (
        MAKERS["packed"],
        {},
        NumericError,
        r"no finite inputs of 'model.layers.1.mlp.down_proj.weight'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_coded_is_refused(
    case: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    make, options, error, words = REFUSALS[case]
    made = make(tmp_path / "base", plain[0])
    inputs = mapped(plain[0] if case == "another base" else made.base, tmp_path)
    if case in ("lacks", "zeros", "nan"):
        (down,) = (
            entry for entry in inputs.inputs if "model.layers.1.mlp.down_proj.weight" in entry.names
        )
        values = {
            "zeros": torch.zeros_like(down.values),
            "nan": torch.full_like(down.values, torch.nan),
        }.get(case)
        other = (
            []
            if values is None
            else [replace(down, trace=down.trace * (case == "nan"), values=values)]
        )
        inputs = streamer.InputMap(
            (*(entry for entry in inputs.inputs if entry is not down), *other), inputs.facts
        )
    with pytest.raises(error, match=words):
        merge(made.base, plain[1], tmp_path / "out", 1, requantize=inputs, **options)
    if case == "nan":  # found while the codes are made: a loader finds no model
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    else:
        assert not (tmp_path / "out").exists()

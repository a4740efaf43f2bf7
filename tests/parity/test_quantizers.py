"""Bases that stand as codes: every decoder gives the bits of the library that defines the encoding; broken codes are decoded or refused."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from quantized import FLOATS, as_modelopt, awq_words, floats_config, small_floats, stream
from quantized_layers import TORCHAO, flattened, hqq_layer, torchao_weight
from quantized_values import CPU, FP8_CONFIG, assert_decodes, base_of, fp8, scales
from seeds import vary
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from streamer.errors import InputError, UnsupportedError
from streamer.linalg.operators import RowBlocks
from streamer.weights.codes import unpack


@pytest.mark.long
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("shape", "blocksize", "dtype", "storage"),
    [
        ((64, 128), 64, torch.float32, torch.uint8),
        ((300, 192), 64, torch.bfloat16, torch.uint8),
        ((37, 256), 128, torch.float16, torch.uint8),
        ((65, 67), 64, torch.float32, torch.uint8),
        ((64, 128), 64, torch.bfloat16, torch.bfloat16),
    ],
)
def test_four_bits_are_what_bitsandbytes_decodes(
    tmp_path: Path, shape, blocksize, dtype, storage, kind, nested
) -> None:
    codes, state, tensors = four_bits(shape, kind, nested, blocksize, dtype, storage)
    weights = base_of(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    library = bnb.dequantize_4bit(codes, state)
    assert torch.equal(weights["w.weight"].whole(CPU).to(dtype), library)
    state.dtype = torch.float32
    assert_decodes(weights, "w.weight", bnb.dequantize_4bit(codes, state))
    assert weights["w.weight"].label == kind.upper()
    assert list(weights) == ["w.weight"]


@pytest.mark.parametrize(
    ("shape", "blocksize"), [((64, 96), 64), ((37, 50), 128), ((64, 64), 128), ((3, 5), 64)]
)
def test_four_bits_where_blocks_do_not_fit_rows(
    tmp_path: Path, shape: tuple[int, int], blocksize: int
) -> None:
    """The library's AVX-512 decoder takes the wrong block there (0.50.2: errors of 1.9 where absmax allows 0.5); this is the formula."""
    codes, state, tensors = four_bits(shape, "nf4", False, blocksize, torch.float32, torch.uint8)
    packed = codes.flatten().numpy()
    count = shape[0] * shape[1]
    index = np.stack([packed >> 4, packed & 15], 1).ravel()[:count]
    expected = state.code.numpy()[index] * state.absmax.numpy()[np.arange(count) // blocksize]
    weights = base_of(tmp_path, tensors, {"quant_method": "bitsandbytes"})
    assert_decodes(weights, "w.weight", torch.from_numpy(expected).view(shape))


def test_eight_bits_are_what_bitsandbytes_decodes(tmp_path: Path) -> None:
    codes, scale, _ = bnb.int8_vectorwise_quant(torch.randn(48, 80).half())
    tensors = {
        "w.weight": codes,
        "w.SCB": scale,
        "w.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    weights = base_of(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert_decodes(weights, "w.weight", bnb.int8_vectorwise_dequant(codes, scale))


@pytest.mark.parametrize("out", [64, 40])
def test_mxfp4_is_what_transformers_decodes(tmp_path: Path, out: int) -> None:
    g = torch.Generator().manual_seed(vary(0))
    blocks = torch.randint(0, 256, (3, out, 4, 16), generator=g, dtype=torch.uint8)
    exps = torch.randint(110, 130, (3, out, 4), generator=g, dtype=torch.uint8)
    name = "mlp.experts.gate_up_proj"
    weights = base_of(
        tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": exps}, {"quant_method": "mxfp4"}
    )
    expected = convert_moe_packed_tensors(blocks, exps, dtype=torch.float32)
    assert_decodes(weights, name, expected)
    expert = weights[name].slice(1)
    assert expert.shape == (128, out)
    assert torch.equal(expert.whole(CPU), expected[1])
    assert torch.equal(expert.load().rows(31, 70), expected[1, 31:70])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_streams_of_bits(bits: int) -> None:
    values = np.random.default_rng(vary(0)).integers(0, 1 << bits, (96, 5))
    words = torch.from_numpy(stream(values, bits))
    assert torch.equal(unpack(words, bits, 0, 96), torch.from_numpy(values).int())
    assert torch.equal(unpack(words, bits, 7, 43), torch.from_numpy(values[7:43]).int())


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("encoding", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_codes_are_decoded_to_the_bit(
    tmp_path: Path, bits: int, act_order: bool, encoding: str, io: str
) -> None:
    """Packed as GPTQModel does: codes along inputs, zero points along outputs, in the first format less one.

    GPTQModel 7.7 subtracts a one of each zero point from whole words, or with 3 bits modulo 8, and undoes that on loading.
    """
    rng = np.random.default_rng(vary(bits))
    inputs = 128
    outputs = 96
    groups = 4
    codes = rng.integers(0, 1 << bits, (inputs, outputs))
    zeros = rng.integers(0, 1 << bits, (groups, outputs))
    stored = stream(zeros.T, bits).T.copy()
    if encoding == "gptq" and bits == 3:
        stored = stream(((zeros - 1) % 8).T, bits).T.copy()
    elif encoding == "gptq":
        ones = int("".join(f"{1:0{bits}b}" for _ in range(32 // bits)), 2)
        stored = (stored.view(np.uint32) - np.uint32(ones)).view(np.int32)
    scale = torch.from_numpy(rng.random((groups, outputs)) / 50).half()
    group = np.arange(inputs) // (inputs // groups)
    if act_order:
        rng.shuffle(group)
    tensors = {
        "w.qweight": torch.from_numpy(stream(codes, bits)),
        "w.qzeros": torch.from_numpy(stored),
        "w.scales": scale,
        "w.g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": inputs // groups,
        "checkpoint_format": encoding,
    }
    weights = base_of(tmp_path, tensors, config, io)
    exact = (codes - zeros[group]) * scale.double().numpy()[group]
    assert_decodes(weights, "w.weight", torch.from_numpy(exact.T.copy()))
    assert list(weights) == ["w.weight"]
    if not act_order:
        del tensors["w.g_idx"]
        assert_decodes(
            base_of(tmp_path / "b", tensors, config, io),
            "w.weight",
            torch.from_numpy(exact.T.copy()),
        )


@pytest.mark.parametrize("stored_less", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_gptq_that_states_the_first_format(
    tmp_path: Path, bits: int, stored_less: int
) -> None:
    """Its zero points are half of the range, even if they are stored as in the second format."""
    codes = np.random.default_rng(vary(bits)).integers(0, 1 << bits, (128, 96))
    half = 1 << (bits - 1)
    tensors = {
        "w.qweight": torch.from_numpy(stream(codes, bits)),
        "w.qzeros": torch.from_numpy(stream(np.full((96, 1), half - stored_less), bits).T.copy()),
        "w.scales": torch.ones(1, 96).half(),
    }
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 128,
        "sym": True,
        "checkpoint_format": "gptq",
    }
    assert_decodes(
        base_of(tmp_path, tensors, config), "w.weight", torch.from_numpy((codes - half).T.copy())
    )


def test_rules_for_single_modules_of_gptq(tmp_path: Path) -> None:
    """As GPTQModel 7.3 reads them: the first that matches from the start; the format is the config's, whatever a rule says."""
    rules = {
        "down": {"sym": True},
        r"+:layers\.0\.o": {"bits": 8, "group_size": 64},
        r".*\.down": {"sym": False, "format": "gptq_v2"},
        r".*\.o": {"bits": 2},
    }
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "format": "gptq",
        "dynamic": rules,
    }
    rng = np.random.default_rng(vary(0))
    tensors = {}
    expected = {}
    for module, bits, size in (("0.up", 4, 32), ("0.down", 4, 32), ("0.o", 8, 64), ("1.o", 2, 32)):
        codes = rng.integers(0, 1 << bits, (128, 96))
        half = 1 << (bits - 1)
        zeros = np.full((128 // size, 96), half)
        if module == "0.down":
            zeros = rng.integers(1, 1 << bits, zeros.shape)
            zeros[0, 0] = (
                half + 1
            )  # its stored value is what a symmetric one of the second format is
        tensors[f"layers.{module}.qweight"] = torch.from_numpy(stream(codes, bits))
        tensors[f"layers.{module}.qzeros"] = torch.from_numpy(stream((zeros - 1).T, bits).T.copy())
        tensors[f"layers.{module}.scales"] = torch.ones(zeros.shape).half()
        expected[module] = torch.from_numpy((codes - zeros.repeat(size, 0)).T.copy())
    weights = base_of(tmp_path, tensors, config)
    for module, values in expected.items():
        assert_decodes(weights, f"layers.{module}.weight", values)


def compressed(**weights) -> tuple[dict, QuantizationScheme]:
    """A quantization config of compressed-tensors, and the same as the library has it."""
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
    }, QuantizationScheme(**group)


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "shape", "size"),
    [(4, (48, 128), 32), (8, (40, 64), 64), (4, (40, 96), None), (3, (33, 96), 32)],
)
def test_packed_integers_are_what_compressed_tensors_decodes(
    tmp_path: Path, bits, shape, size, symmetric, io
) -> None:
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    config, scheme = compressed(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    g = torch.Generator().manual_seed(vary(0))
    columns = shape[1] // (size or shape[1])
    state = {
        "weight": torch.randn(shape, generator=g),
        "weight_scale": (torch.rand((shape[0], columns), generator=g) / 4 + 0.1).bfloat16().float(),
        "weight_zero_point": torch.randint(
            -3, 4, (shape[0], columns), generator=g, dtype=torch.int8
        )
        * (not symmetric),
    }
    packed = PackedQuantizationCompressor.compress(state, scheme)
    library = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    assert ("weight_zero_point" in packed) != symmetric
    tensors = {f"w.{k}": t for k, t in packed.items()}
    weights = base_of(tmp_path, tensors, config | {"format": "pack-quantized"}, io)
    assert list(weights) == ["w.weight"]
    assert weights["w.weight"].label == f"INT{bits} (compressed-tensors)"
    assert_decodes(weights, "w.weight", library)


def test_packed_integers_of_old_versions_are_refused(tmp_path: Path) -> None:
    """compressed-tensors 0.10 put four values of 7 bits in a word, so that they look like 8 bits."""
    config, _ = compressed(num_bits=7, type="int", symmetric=True, strategy="channel")
    tensors = {
        "w.weight_packed": torch.zeros(48, 128 // 4, dtype=torch.int32),
        "w.weight_scale": torch.ones(48, 1),
        "w.weight_shape": torch.tensor([48, 128]),
    }
    weights = base_of(tmp_path, tensors, config | {"format": "pack-quantized"})
    with pytest.raises(
        UnsupportedError, match=r"packing of 7 bits by compressed-tensors up to 0\.10"
    ):
        _ = weights["w.weight"]


@pytest.mark.parametrize(
    ("columns", "size", "groups"), [(100, 32, 4), (96, 36, 3), (100, 25, 3), (100, 0, 3)]
)
def test_packed_groups_that_do_not_divide_the_columns_are_refused(
    tmp_path: Path, columns: int, size: int, groups: int
) -> None:
    """The library refuses them too; groups of another size would be read from the number of scales."""
    weights = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": size or 32,
    }
    group = {"targets": ["Linear"], "weights": weights} if size else {}
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group} if size else {},
    }
    state = {"weight": torch.zeros(16, columns), "weight_scale": torch.ones(16, groups)}
    if size and columns % size:
        with pytest.raises(ValueError, match="must be divis"):
            PackedQuantizationCompressor.compress(state, QuantizationScheme(**group))
    tensors = {
        "w.weight_packed": torch.zeros(16, columns // 4, dtype=torch.int32),
        "w.weight_scale": torch.ones(16, groups),
        "w.weight_shape": torch.tensor([16, columns]),
    }
    found = base_of(tmp_path, tensors, config | {"format": "pack-quantized"})
    with pytest.raises(InputError, match=r"w\.weight|groups"):
        _ = found["w.weight"]


@pytest.mark.parametrize(
    ("kind", "grid", "strategy"),
    [
        ("float", (1,), {"strategy": "tensor"}),
        ("float", (64, 1), {"strategy": "channel"}),
        ("float", (4, 3), {"strategy": "block", "block_structure": [16, 32]}),
        ("int", (64, 1), {"strategy": "channel"}),
        ("int", (64, 3), {"strategy": "group", "group_size": 32}),
    ],
)
def test_scaled_codes_are_what_compressed_tensors_decodes(
    tmp_path: Path, kind: str, grid, strategy: dict
) -> None:
    config, scheme = compressed(num_bits=8, type=kind, symmetric=True, **strategy)
    codes = (
        fp8((64, 96)) if kind == "float" else torch.randint(-128, 128, (64, 96), dtype=torch.int8)
    )
    scale = scales(grid)
    weights = base_of(
        tmp_path,
        {"w.weight": codes, "w.weight_scale": scale},
        config | {"format": f"{kind}-quantized"},
    )
    assert_decodes(weights, "w.weight", dequantize(codes, scale, args=scheme.weights))


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("shape", [(48, 128), (33, 96), (1, 32)])
@pytest.mark.parametrize("encoding", FLOATS)
def test_small_floats_are_what_compressed_tensors_decodes(
    tmp_path: Path, encoding: str, shape, io: str
) -> None:
    parts, decoded = small_floats(torch.randn(shape) * torch.rand(shape[0], 1), encoding)
    weights = base_of(
        tmp_path, {f"w{key}": t for key, t in parts.items()}, floats_config(encoding), io
    )
    assert list(weights) == ["w.weight"]
    assert_decodes(weights, "w.weight", decoded)


def test_all_codes_and_scales_of_fp4(tmp_path: Path) -> None:
    """Every byte under every scale that the library decodes to a number."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
    for encoding, scale in (
        (
            "nvfp4-pack-quantized",
            torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127],
        ),
        ("mxfp4-pack-quantized", torch.arange(255, dtype=torch.uint8)),
    ):
        size = 16 if encoding.startswith("nv") else 32
        rows = len(scale)
        groups = 512 // size
        parts = {"weight_packed": packed[:rows], "weight_scale": scale[:, None].repeat(1, groups)}
        if size == 16:
            parts["weight_scale"] = parts["weight_scale"].view(torch.float8_e4m3fn)
            parts["weight_global_scale"] = torch.tensor([709.7066])
        scheme = preset_name_to_scheme(FLOATS[encoding], ["Linear"])
        library = BaseCompressor.get_value_from_registry(encoding).decompress(dict(parts), scheme)[
            "weight"
        ]
        weights = base_of(
            tmp_path / encoding,
            {f"w.{key}": t for key, t in parts.items()},
            floats_config(encoding),
        )
        assert torch.equal(weights["w.weight"].whole(CPU).bfloat16(), library)


@pytest.mark.parametrize("outer", [(), (1,)])
def test_nvfp4_of_modelopt_is_decoded_to_the_bit(tmp_path: Path, outer: tuple[int, ...]) -> None:
    """As `NVFP4QTensor.dequantize` in the published source computes it: the product of both scales, then of the value."""
    parts = as_modelopt(small_floats(torch.randn(48, 96), "nvfp4-pack-quantized")[0])
    parts[".weight_scale_2"] = parts[".weight_scale_2"].view(outer)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    codes = np.empty((48, 96), int)
    codes[:, 0::2], codes[:, 1::2] = parts[".weight"].numpy() & 15, parts[".weight"].numpy() >> 4
    scale = parts[".weight_scale"].float().numpy() * parts[".weight_scale_2"].numpy()
    decoded = torch.from_numpy(table[codes] * scale.repeat(16, 1))
    group = {"weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}}
    config = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": group},
    }
    tensors = {f"w{key}": t for key, t in parts.items()} | {"w.input_scale": torch.tensor(0.5)}
    for stated in (config, {"quant_method": "modelopt"}):
        assert_decodes(base_of(tmp_path / str(len(stated)), tensors, stated), "w.weight", decoded)


def test_awq_codes_are_decoded_to_the_bit(tmp_path: Path) -> None:
    """Packed as AutoAWQ's gemm layers are."""
    rng = np.random.default_rng(vary(0))
    inputs = 128
    outputs = 48
    size = 32
    codes = rng.integers(0, 16, (inputs, outputs))
    zeros = rng.integers(0, 16, (inputs // size, outputs))
    scale = torch.from_numpy(rng.random((inputs // size, outputs)) / 50).half()
    tensors = {"w.qweight": awq_words(codes), "w.qzeros": awq_words(zeros), "w.scales": scale}
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size,
        "version": "gemm",
        "zero_point": True,
    }
    group = np.arange(inputs) // size
    exact = (codes - zeros[group]) * scale.double().numpy()[group]
    assert_decodes(base_of(tmp_path, tensors, config), "w.weight", torch.from_numpy(exact.T.copy()))


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("bits", "shape", "size", "dtype", "floats"),
    [
        (8, (37, 64), 32, torch.float16, False),
        (5, (40, 96), None, torch.bfloat16, False),
        (4, (40, 96), 64, torch.bfloat16, False),
        (4, (64, 96), 64, torch.float32, True),
        (3, (37, 64), 64, torch.float16, False),
        (3, (40, 96), 32, torch.bfloat16, True),
        (2, (40, 96), 64, torch.float16, True),
        (1, (96, 128), 64, torch.bfloat16, False),
    ],
)
def test_hqq_is_what_the_library_decodes(
    tmp_path: Path, bits, shape, size, dtype, floats: bool, axis: int, io
) -> None:
    """Groups longer than a row and shorter, as the library packs them; each operation rounds to the model's dtype."""
    parts, decoded = hqq_layer(torch.randn(shape), bits, axis, dtype, size, floats)
    weights = base_of(
        tmp_path, {f"w{key}": t for key, t in parts.items()}, {"quant_method": "hqq"}, io
    )
    assert list(weights) == ["w.weight"]
    assert_decodes(weights, "w.weight", decoded)


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", TORCHAO)
def test_torchao_is_what_the_library_decodes(
    tmp_path: Path, way: str, dtype: torch.dtype, io: str
) -> None:
    made, decoded = torchao_weight(torch.randn(64, 96).to(dtype), way)
    tensors, metadata = flattened({"w.weight": made, "w.bias": torch.ones(64)})
    weights = base_of(tmp_path, tensors, {"quant_method": "torchao"}, io, metadata)
    assert set(weights) == {"w.weight", "w.bias"}
    assert_decodes(weights, "w.weight", decoded)


COMPRESSED_BLOCKS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {"weights": {"num_bits": 8, "type": "float", "block_structure": "128x128"}}
    },
}
"""As compressed-tensors up to 0.10 writes it."""


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize(
    ("shape", "grid", "config"),
    [
        ((256, 384), (2, 3), FP8_CONFIG),
        ((64, 96), (2, 3), {"quant_method": "fp8", "weight_block_size": [32, 32]}),
        ((64, 96), (64, 3), {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
        ((64, 96), (64, 1), {"quant_method": "fbgemm_fp8"}),
        ((64, 96), (1, 1), {"quant_method": "fp8"}),
        (
            (64, 96),
            (64, 3),
            {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [1, 32]},
        ),
    ],
)
def test_fp8_is_what_transformers_decodes(
    tmp_path: Path, shape, grid, config: dict, io: str
) -> None:
    code = fp8(shape)
    exponents = torch.randint(100, 130, grid, dtype=torch.uint8)
    for scale in (
        (exponents, exponents.view(torch.float8_e8m0fnu))
        if "scale_fmt" in config
        else (scales(grid),)
    ):
        weights = base_of(
            tmp_path / str(scale.dtype), {"w.weight": code, "w.weight_scale_inv": scale}, config, io
        )
        assert_decodes(
            weights, "w.weight", Fp8Dequantize(None)._dequantize_one(code, scale, torch.float32)
        )
        assert list(weights) == ["w.weight"]


@pytest.mark.parametrize(
    ("grid", "config"),
    [
        ((2, 3), {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        ((2, 3), COMPRESSED_BLOCKS),
        ((2, 1, 3, 1), {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}),
    ],
)
def test_fp8_blocks_that_do_not_divide_the_rows(
    tmp_path: Path, grid: tuple[int, ...], config: dict
) -> None:
    """192 rows are one and a half blocks, not two of 96."""
    code = fp8((192, 384))
    scale = scales(grid)
    weights = base_of(tmp_path, {"w.weight": code, "w.weight_scale": scale}, config)
    by_value = scale.reshape(2, 3).repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)
    assert_decodes(weights, "w.weight", code.float() * by_value)


def test_fp8_blocks_of_unknown_size(tmp_path: Path) -> None:
    weights = base_of(
        tmp_path,
        {"w.weight": fp8((192, 384)), "w.weight_scale": scales((2, 3))},
        {"quant_method": "fp8"},
    )
    with pytest.raises(
        UnsupportedError,
        match=r"blocks of 96x128 and of 128x128 fit shape \[192, 384\] and scale \[2, 3\]",
    ):
        _ = weights["w.weight"]


def test_a_stack_of_fp8_matrices(tmp_path: Path) -> None:
    code = fp8((3, 64, 96))
    scale = scales((3, 2, 3))
    config = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    weights = base_of(tmp_path, {"experts.up": code, "experts.up_scale_inv": scale}, config)
    expected = Fp8Dequantize(None)._dequantize_one(code, scale, torch.float32)
    assert_decodes(weights, "experts.up", expected)
    assert torch.equal(weights["experts.up"].slice(2).rows(5, 40), expected[2, 5:40])


@pytest.mark.parametrize(
    "change",
    [
        {"blocksize": 0},
        {"blocksize": "64"},
        {"blocksize": 128},
        {"shape": [64]},
        {"shape": [64, -128]},
        {"shape": None},
        {"shape": [64, 256]},
        {"nested_offset": "1"},
        {"nested_blocksize": None},
        {"shape": [2**40, 2**40]},
    ],
)
def test_a_quant_state_that_does_not_fit(tmp_path: Path, change: dict) -> None:
    _, _, tensors = four_bits((64, 128), "nf4", True, 64, torch.float32, torch.uint8)
    key = "w.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[key].numpy().tobytes()) | change
    tensors[key] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    with pytest.raises(InputError, match=r"tensor 'w\.weight'"):
        base_of(tmp_path, tensors)["w.weight"]
    tensors[key] = torch.zeros(7, dtype=torch.uint8)
    with pytest.raises(InputError, match="is not JSON"):
        base_of(tmp_path, tensors)["w.weight"]


def test_products_with_rows_as_they_are_stored(tmp_path: Path) -> None:
    """What `--max-memory` multiplies with is the decoded matrix."""
    _, _, tensors = four_bits((64, 128), "nf4", True, 64, torch.float32, torch.uint8)
    weight = base_of(tmp_path, tensors, io="pread")["w.weight"]
    blocks = RowBlocks(weight.matrix, weight.at_hand().rows, torch.empty(0))
    assert torch.equal(blocks.dense(), weight.whole(CPU))
    assert torch.equal(blocks.T.dense(), weight.whole(CPU).T)


def four_bits(
    shape, kind: str, nested: bool, blocksize: int, dtype: torch.dtype, storage: torch.dtype
):
    """Codes, state, and the tensors that stand on disk."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(vary(0))).to(dtype)
    codes, state = bnb.quantize_4bit(
        W, quant_type=kind, compress_statistics=nested, blocksize=blocksize, quant_storage=storage
    )
    tensors = {
        "w.weight": codes,
        **{f"w.weight.{k}": v for k, v in state.as_dict(packed=True).items()},
    }
    assert ("w.weight.nested_absmax" in tensors) == nested
    return codes, state, tensors

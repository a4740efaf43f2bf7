"""Formats of quantized weights: what is looked up, what is refused by its name, what is broken."""

import json
from pathlib import Path

import pytest
import torch
from quantized_values import (
    AWQ_WORDS,
    BNB,
    CODES,
    CPU,
    FP8_CONFIG,
    HQQ,
    base_of,
    fp8,
    packed,
    torchao,
)

from streamer.errors import FormatError, InputError, UnsupportedError
from streamer.weights.logical import plain_weights
from streamer.weights.model_config import ModelConfig, read_model_config


def test_a_view_holds_the_names_that_it_looks_up(tmp_path: Path) -> None:
    """What is in the view, what it iterates over and what can be looked up are one set, whatever was replaced or added."""
    plain = torch.randn(128, 128)
    scale = torch.rand(1, 1) + 0.1
    tensors = {"w.weight": fp8((128, 128)), "w.weight_scale_inv": scale, "v.weight": plain}
    base = base_of(tmp_path, tensors, FP8_CONFIG)
    v = base.stored["v.weight"].tensors["weight"]
    view = base.replaced({"w.weight": v, "new.weight": v}).extended(
        {"v.weight[:2]": lambda weights: weights["v.weight"]}
    )
    assert set(base) == {"w.weight", "v.weight"}
    assert list(view) == [*base, "new.weight", "v.weight[:2]"]
    assert len(view) == 4
    assert all(name in view and torch.equal(view[name].whole(CPU), plain) for name in view)
    assert not view["w.weight"].quantized
    assert base["w.weight"].quantized
    assert view.quantized_names == {"w.weight"}
    assert [view.file_index(name) for name in ("v.weight", "w.weight", "new.weight")] == [
        base.file_index("v.weight"),
        base.file_index("w.weight"),
        3,
    ]
    for name in ("w.weight_scale_inv", "x"):
        assert name not in view
        with pytest.raises(KeyError):
            view[name]


@pytest.mark.parametrize(
    "quantization",
    [
        *(
            {"quant_method": m}
            for m in (
                "aqlm",
                "quanto",
                "bitnet",
                "eetq",
                "vptq",
                "higgs",
                "auto-round",
                "quark",
                ["x"],
                3,
            )
        ),
        {"bits": 4},
        {"quant_method": "compressed-tensors", "format": "mxfp6-pack-quantized"},
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "transform_config": {"a": 1},
        },
        {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "sparsity_config": {"format": "sparse-24-bitmask"},
        },
        {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"},
        {"quant_method": "gptq", "bits": 4, "is_marlin_format": True},
    ],
)
def test_other_ways_of_quantization_are_refused_by_name(tmp_path: Path, quantization: dict) -> None:
    with pytest.raises(UnsupportedError) as e:
        base_of(tmp_path, CODES, quantization)
    text = str(e.value)
    assert repr(quantization.get("quant_method")) in text
    assert text.startswith(f"{tmp_path}: config.json: bases quantized by ")
    assert text.endswith("use the 16-bit model")
    for key, value in quantization.items():
        assert (
            key in ("quant_method", "bits")
            or f"{key}={value!r}" in text
            or value in ("dense", "float-quantized")
            or f"with {key}" in text
        )


@pytest.mark.parametrize(
    ("apart", "config", "quantization"),
    [
        ({"quant_algo": "NVFP4"}, {}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        ({"quant_algo": None, "kv_cache_quant_algo": "FP8"}, {}, {}),
        ([], {}, {}),
        ({"quant_algo": "NVFP4"}, {"quantization_config": BNB}, BNB),
        ({"quant_algo": "NVFP4"}, None, {}),
    ],
)
def test_modelopt_may_state_its_quantization_apart(
    tmp_path: Path, apart: object, config: dict | None, quantization: dict
) -> None:
    producer = {"producer": {"name": "modelopt"}, "quantization": apart}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(producer))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "test", **config}))
    read = read_model_config(tmp_path)
    assert read.quantization == quantization
    assert bool(read.values) == (config is not None)
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps(producer | {"producer": {"name": "x"}})
    )
    assert read_model_config(tmp_path).quantization == (config or {}).get("quantization_config", {})


@pytest.mark.parametrize(
    "config", [None, {"quant_method": "bitsandbytes"}, {"quant_method": "fp8"}]
)
def test_codes_that_nothing_explains_are_refused(tmp_path: Path, config: dict | None) -> None:
    weights = base_of(tmp_path, CODES, config)
    with pytest.raises(
        UnsupportedError,
        match=r"tensor 'w\.weight': dtype I8 is not one of .* use the 16-bit model",
    ):
        weights["w.weight"]
    with pytest.raises(
        UnsupportedError, match=r"tensor 'w\.weight': dtype I8 with no scale or table"
    ):
        plain_weights(weights, ModelConfig())
    assert torch.equal(weights["w.bias"].whole(CPU), torch.zeros(64))


NVFP4 = {
    "w.weight_packed": torch.zeros(64, 48, dtype=torch.uint8),
    "w.weight_scale": torch.ones(64, 6).to(torch.float8_e4m3fn),
    "w.weight_global_scale": torch.ones(1),
}
MODELOPT = {
    "w.weight": NVFP4["w.weight_packed"],
    "w.weight_scale": NVFP4["w.weight_scale"],
    "w.weight_scale_2": torch.ones(()),
}
EXPONENTS = torch.full((64, 3), 127, dtype=torch.uint8)


def float_groups(encoding: str, **weights) -> dict:
    """A config of compressed-tensors that states this of the weights."""
    group = {"weights": {"num_bits": 4, "type": "float", "group_size": 16, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": encoding,
        "config_groups": {"group_0": group},
    }


MXFP8 = float_groups("mxfp8-quantized", num_bits=8, group_size=32)

FOUR = float_groups("nvfp4-pack-quantized")
FP8, BY_HQQ, BY_MODELOPT = ({"quant_method": name} for name in ("fp8", "hqq", "modelopt"))
GPTQ = {"quant_method": "gptq", "bits": 4}
WIDE = fp8((64, 96))

BROKEN = {
    "nvfp4: no scale of the tensor": ({k: t for k, t in NVFP4.items() if "global" not in k}, FOUR, "do not fit"),
    "nvfp4: two scales of the tensor": (NVFP4 | {"w.weight_global_scale": torch.ones(2)}, FOUR, "do not fit"),
    "nvfp4: a scale of the tensor without dimensions, which the library rounds to bfloat16": (
        NVFP4 | {"w.weight_global_scale": torch.ones(())}, FOUR, "do not fit"
    ),
    "nvfp4: groups of 32": (NVFP4 | {"w.weight_scale": NVFP4["w.weight_scale"][:, :3]}, FOUR, "do not fit"),
    "nvfp4: groups of 32 in the config": (NVFP4, float_groups("nvfp4-pack-quantized", group_size=32), "in groups of 16 that"),
    "nvfp4: asymmetric in the config": (NVFP4, float_groups("nvfp4-pack-quantized", symmetric=False), "groups of 16 that"),
    "nvfp4: zero points": (NVFP4 | {"w.weight_zero_point": torch.ones(64, 6)}, FOUR, "'w.weight_zero_point'"),
    "nvfp4: transposed": (NVFP4 | {"w.weight_packed": torch.zeros(48, 64, dtype=torch.uint8)}, FOUR, "do not fit"),
    "nvfp4: rows padded": (NVFP4 | {"w.weight_scale": torch.ones(128, 6).to(torch.float8_e4m3fn)}, FOUR, "do not fit"),
    "nvfp4: a stack": (NVFP4 | {"w.weight_packed": torch.zeros(2, 64, 48, dtype=torch.uint8)}, FOUR, "do not fit"),
    "mxfp4: six bits": (
        {"w.weight_packed": torch.zeros(64, 72, dtype=torch.uint8), "w.weight_scale": EXPONENTS},
        float_groups("mxfp4-pack-quantized", group_size=32),
        "do not fit",
    ),
    "mxfp4: NVFP4 in the config": (
        {"w.weight_packed": NVFP4["w.weight_packed"], "w.weight_scale": EXPONENTS},
        FOUR,
        "in groups of 32 that",
    ),
    "mxfp8: groups of 96": ({"w.weight": WIDE, "w.weight_scale": EXPONENTS[:, :1]}, MXFP8, "MXFP8 as"),
    "mxfp8: two rows a scale": ({"w.weight": WIDE, "w.weight_scale": EXPONENTS[:32]}, MXFP8, "MXFP8 as"),
    "mxfp8: groups of 64 in the config": (
        {"w.weight": WIDE, "w.weight_scale": EXPONENTS},
        float_groups("mxfp8-quantized", num_bits=8, group_size=64),
        r"for \[64\] inputs by the config",
    ),
    "mxfp8: scales that are no exponents": ({"w.weight": WIDE, "w.weight_scale": torch.ones(64, 3)}, MXFP8, "MXFP8 as"),
    "mxfp8: exponents of another dtype, which the library reads otherwise": (
        {"w.weight": WIDE, "w.weight_scale": EXPONENTS.view(torch.float8_e8m0fnu)},
        MXFP8,
        "MXFP8 as .* is not supported",
    ),
    "modelopt: scales of the inputs": (MODELOPT | {"w.pre_quant_scale": torch.ones(96)}, BY_MODELOPT, "'w.pre_quant_scale'"),
    "modelopt: groups of 32 in the config": (
        MODELOPT, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "in groups of 16 that"
    ),
    "modelopt: no scale of the tensor": ({k: t for k, t in MODELOPT.items() if "_2" not in k}, BY_MODELOPT, "dtype U8 is not one of"),
    "fp8: a scale for other rows": (
        {"w.weight": WIDE, "w.weight_scale": torch.ones(3, 1)},
        FP8,
        r"do not fit: w\.weight F8_E4M3 \[64, 96\], w\.weight_scale F32 \[3, 1\]",
    ),
    "fp8: an integer scale": ({"w.weight": WIDE, "w.weight_scale": torch.ones(1, dtype=torch.int64)}, FP8, "of dtype I64"),
    "fp8: a vector": ({"w.weight": fp8((64,)), "w.weight_scale": torch.ones(1)}, FP8, "F8_E4M3 with 1 dimensions"),
    "int8: a scale for other rows": ({"w.weight": CODES["w.weight"], "w.SCB": torch.ones(63)}, BNB, r"do not fit: .*w\.SCB F32 \[63\]"),
    "int8: another format": (
        {"w.weight": CODES["w.weight"], "w.SCB": torch.ones(64), "w.weight_format": torch.ones(1, dtype=torch.uint8)},
        BNB,
        "weight_format other than 0",
    ),
    "mxfp4: scales of other experts": (
        {
            "w_blocks": torch.zeros(2, 8, 1, 16, dtype=torch.uint8),
            "w_scales": torch.zeros(3, 8, 1, dtype=torch.uint8),
        },
        {"quant_method": "mxfp4"},
        "do not fit",
    ),
    "gptq: five bits": (packed(), {"quant_method": "gptq", "bits": 5}, "GPTQ with 5 bits"),
    "gptq: other outputs": (packed(scales=torch.ones(1, 40)), GPTQ, "do not fit"),
    "gptq: marlin": (packed(), GPTQ | {"checkpoint_format": "marlin"}, "GPTQ in the format marlin"),
    "gptq: two formats": (
        packed(), GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"},
        "GPTQ in the format gptq and gptq_v2 is not supported; use the 16-bit model",
    ),
    "gptq: symmetric in name only": (packed(), GPTQ | {"sym": True}, "other than that of sym=true"),
    "gptq: excluded by a rule": (packed(), GPTQ | {"dynamic": {"-:w": {}, ".*": {}}}, "'w.qweight': a .* that a rule .* excludes"),
    **{
        f"gptq: unreadable rules {n}": (packed(), GPTQ | {"dynamic": rules}, 'cannot read "dynamic"')
        for n, rules in enumerate(({"(": {}}, {"w": 3}, ["w"], {"w{9999999999}": {}}, {"(" * 9999 + ")" * 9999: {}}))
    },
    "gptq: a group that is not there": (packed(g_idx=torch.ones(64, dtype=torch.int32)), GPTQ, "names absent groups"),
    "awq: gemv": (packed(qweight=AWQ_WORDS), {"quant_method": "awq", "version": "gemv"}, "AWQ .* version='gemv'"),
    "hqq: other rows": (HQQ | {"w.W_q": torch.zeros(128, 32, dtype=torch.uint8)}, BY_HQQ, "do not fit"),
    "hqq: words of another dtype": (HQQ | {"w.W_q": torch.zeros(96, 32, dtype=torch.int8)}, BY_HQQ, "do not fit"),
    "hqq: one scale for the tensor": (HQQ | {"w.scale": torch.tensor(1.0), "w.zero": torch.tensor(1.0)}, BY_HQQ, "do not fit"),
    "hqq: zero points of another dtype": (HQQ | {"w.zero": torch.ones(192, 1)}, BY_HQQ, "do not fit"),
    "hqq: other groups": (HQQ | {f"w.{k}": torch.ones(128, 1) for k in ("scale", "zero")}, BY_HQQ, "do not fit"),
    "hqq: another shape": (HQQ | {"w.shape": torch.tensor([64, 95])}, BY_HQQ, "do not fit"),
    "hqq: no zero points": ({k: t for k, t in HQQ.items() if k != "w.zero"}, BY_HQQ, "HQQ without 'zero'"),
    "hqq: eight bits by its packing": (
        HQQ | {"w.packing": torch.tensor([*b"8bit_u8"], dtype=torch.uint8)}, BY_HQQ,
        r"w\.packing': expected '4bit_u8' by the shapes of its HQQ layer, found '8bit_u8'; get the file again",
    ),
    "hqq: another axis": (HQQ | {"w.axis": torch.tensor(0)}, BY_HQQ, r"w\.axis': expected 1 by .*, found 0"),
    "hqq: another group size": (HQQ | {"w.group_size": torch.tensor(64)}, BY_HQQ, r"w\.group_size': expected 32 by"),
    "awq: other groups": (packed(qweight=AWQ_WORDS), {"quant_method": "awq", "group_size": 32}, "do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_codes(tmp_path: Path, name: str) -> None:
    tensors, config, message = BROKEN[name]
    weights = base_of(tmp_path, tensors, config)
    with pytest.raises(InputError, match=message):
        weights["w" if "w_blocks" in tensors else "w.weight"].whole(CPU)


@pytest.mark.parametrize("role", ["zero_q", "scale_q", "zero_scale"])
def test_quantized_scales_of_hqq_are_not_supported(tmp_path: Path, role: str) -> None:
    kept = {k: t for k, t in HQQ.items() if k.removeprefix("w.") not in role.split("_")}
    weights = base_of(tmp_path, kept | {f"w.{role}": torch.ones(192, 1)}, {"quant_method": "hqq"})
    with pytest.raises(
        UnsupportedError, match=f"HQQ with '{role}' is not supported; use the 16-bit model"
    ):
        weights["w.weight"]


BYTES = torch.zeros(64, 96, dtype=torch.int8)
INT4 = {"scale": torch.ones(3, 64), "zero_point": torch.ones(3, 64)}
INT4_DATA = {"block_size": [1, 32], "shape": [64, 96]}
INT8 = {"scale": torch.ones(64, 3)}
INT8_DATA = {"block_size": [1, 32]}


@pytest.mark.parametrize(
    ("kind", "qdata", "data", "parts", "message"),
    [
        *(
            (
                kind,
                BYTES,
                INT8_DATA,
                INT8,
                rf"torchao's {kind} is not supported; use the 16-bit model",
            )
            for kind in (
                "Int4TilePackedTo4dTensor",
                "Int4PlainInt32Tensor",
                "MXTensor",
                "NVFP4Tensor",
                "Other",
            )
        ),
        (
            "Int4TilePackedTo4dTensor",
            torch.zeros(8, 1, 32, 4, dtype=torch.int32),
            INT4_DATA,
            {"scale_and_zero": torch.ones(3, 64, 2)},
            "Int4TilePackedTo4dTensor with scale_and_zero is not",
        ),
        (
            "Int8Tensor",
            BYTES,
            INT8_DATA,
            INT8 | {"act_pre_scale": torch.ones(96)},
            "Int8Tensor with act_pre_scale is not",
        ),
        ("Int8Tensor", BYTES, {"block_size": [1, 16]}, INT8, "do not fit"),
        ("Int8Tensor", BYTES, {"block_size": [2, 32]}, {"scale": torch.ones(32, 3)}, None),
        ("Int8Tensor", BYTES, {"block_size": [64, 19]}, {"scale": torch.ones(1, 5)}, "do not fit"),
        ("Int8Tensor", BYTES, {"block_size": [1, 96]}, {"scale": torch.ones(64)}, "do not fit"),
        (
            "Int8Tensor",
            BYTES,
            INT8_DATA,
            INT8 | {"zero_point": torch.ones(64, 1).to(torch.int8)},
            "do not fit",
        ),
        (
            "Int8Tensor",
            BYTES,
            INT8_DATA,
            INT8 | {"zero_point": torch.ones(64, 3, dtype=torch.int32)},
            "do not fit",
        ),
        *(
            (
                kind,
                BYTES,
                INT8_DATA,
                INT8 | {"zero_point": torch.ones(64, 3)},
                r"zero point in F32 .* use the 16-bit model",
            )
            for kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor")
        ),
        ("Float8Tensor", fp8((64, 96)).view(torch.float8_e5m2), INT8_DATA, INT8, "do not fit"),
        ("Float8Tensor", fp8((64, 96)), {"block_size": [1, 96]}, INT8, "do not fit"),
        ("Float8Tensor", fp8((64, 96)), INT8_DATA, INT8, None),
        ("Int8Tensor", fp8((64, 96)), INT8_DATA, INT8, "do not fit"),
        ("Int4Tensor", BYTES[:, :48], INT4_DATA, INT4, None),
        ("Int4Tensor", BYTES[:, :48], INT4_DATA, {"scale": torch.ones(3, 64)}, "do not fit"),
        (
            "Int4Tensor",
            BYTES[:, :48],
            INT4_DATA,
            INT4 | {"zero_point": torch.ones(3, 64).to(torch.int8)},
            "do not fit",
        ),
        ("Int4Tensor", BYTES[:, :48], INT4_DATA | {"block_size": [1, 48]}, INT4, "do not fit"),
        ("Int4Tensor", BYTES, INT4_DATA, INT4, "do not fit"),
    ],
)
def test_classes_of_torchao(
    tmp_path: Path, kind: str, qdata, data: dict, parts: dict, message: str | None
) -> None:
    tensors, config, metadata = torchao(kind, qdata, data, **parts)
    weights = base_of(tmp_path, tensors, config, metadata=metadata)
    if message is None:
        assert weights["w.weight"].whole(CPU).shape == (64, 96)
        return
    with pytest.raises(InputError, match=message):
        weights["w.weight"]


@pytest.mark.parametrize(
    "stated", [None, "{", "[]", '{"_type": "Int8Tensor"}', '{"_type": "Tensor"}']
)
def test_metadata_that_does_not_describe_the_tensor(tmp_path: Path, stated: str | None) -> None:
    tensors, config, _ = torchao("Int8Tensor", BYTES, INT8_DATA, **INT8)
    other = {} if stated is None else {"w.weight": stated}
    with pytest.raises(
        FormatError, match=r"the file's metadata does not describe 'w\.weight' as torchao does"
    ):
        base_of(tmp_path, tensors, config, metadata={"tensor_names": "[]"} | other)["w.weight"]


def test_a_weight_that_stands_twice(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"'w\.qweight' and 'w\.weight' are the same weight"):
        base_of(tmp_path, packed(weight=torch.ones(32, 64)), {"quant_method": "gptq", "bits": 4})

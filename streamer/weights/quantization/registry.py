"""Register the formats of quantized weights: which tensors on disk form one weight, by name and dtype, and which class decodes them.

The model's ``quantization_config`` must name a method of some format. Looking up a tensor of quantized values that no format claims is
refused by name, so raw quantized values never reach a computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from streamer.errors import UnsupportedError
from streamer.weights.base import QuantizedWeight, StoredTensor
from streamer.weights.quantization.awq import AWQ
from streamer.weights.quantization.bitsandbytes import EightBit, FourBit
from streamer.weights.quantization.compressed_tensors import PackedIntegers
from streamer.weights.quantization.fp4 import MXFP4, PackedFP4
from streamer.weights.quantization.fp8 import FP8
from streamer.weights.quantization.gptq import GPTQ
from streamer.weights.quantization.hqq import HQQ, SETTINGS, UNSUPPORTED
from streamer.weights.quantization.scaled_codes import Scaled
from streamer.weights.quantization.torchao import OPTIONAL, torchao_weight


@dataclass(frozen=True)
class QuantizationFormat:
    """One way in which libraries store quantized weights.

    Attributes
    ----------
    title, stored
        Readable name, and the tensors on disk.
    quant_methods
        Values of ``quant_method`` that use this format; None is one of them if it needs no config.
    values
        Suffix of the quantized tensor's name, its dtypes (empty for any), and the suffix that replaces it in the weight's name.
    companion_suffixes
        For each other role, the suffixes that may follow the stem; the first that exists is used.
    optional
        Like `companion_suffixes`, for tensors that may be missing.
    make
        Makes the weight that these tensors store.
    requantizes
        Whether `merge` writes merged weights back in this encoding.
    """

    title: str
    stored: str
    quant_methods: frozenset[str | None]
    values: tuple[str, tuple[str, ...], str]
    companion_suffixes: Mapping[str, tuple[str, ...]]
    make: Callable[[str, Mapping[str, StoredTensor], Mapping[str, Any]], QuantizedWeight]
    optional: Mapping[str, tuple[str, ...]] | None = None
    requantizes: bool = False

    def claim(self, tensor: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, dict[str, str]] | None:
        """Recognise a weight's tensor of quantized values by name and dtype, and collect its companions.

        For GPTQ: ``layers.0.q_proj.qweight`` → ``layers.0.q_proj.weight`` and ``{"weight": "layers.0.q_proj.qweight",
        "zeros": "layers.0.q_proj.qzeros", "scales": "layers.0.q_proj.scales"}``.

        Returns
        -------
        tuple or None
            The weight's name and its tensors' names by role; None for any other tensor.
        """
        ending, dtypes, instead = self.values
        if not tensor.endswith(ending) or (dtypes and tensors[tensor].info.dtype not in dtypes):
            return None
        stem = tensor.removesuffix(ending)
        roles = {"weight": tensor}
        for role, endings in {**self.companion_suffixes, **(self.optional or {})}.items():
            found = next((stem + e for e in endings if stem + e in tensors), None)
            if found is not None:
                roles[role] = found
            elif role in self.companion_suffixes:
                return None
        return stem + instead, roles


FORMATS: tuple[QuantizationFormat, ...] = (
    QuantizationFormat("FP8 e4m3: scale of a block, a row or the tensor; MXFP8", "`weight`, `weight_scale_inv` or `weight_scale`",
          frozenset({None, "fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt"}), ("", ("F8_E4M3",), ""),
          {"quant_scale": ("_scale_inv", "_scale")}, FP8.of, {"zeros": ("_zero_point",)}, requantizes=True),
    QuantizationFormat("bitsandbytes NF4 and FP4, double quantization too", "`weight`, `.absmax`, `.quant_map`, `.quant_state.*`",
          frozenset({None, "bitsandbytes"}), ("", (), ""),
          {"absmax": (".absmax",), "map": (".quant_map",),
           "state": (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")}, FourBit.of,
          {"nested_absmax": (".nested_absmax",), "nested_map": (".nested_quant_map",)}),
    QuantizationFormat("bitsandbytes int8", "`weight`, `SCB`",
          frozenset({None, "bitsandbytes"}), (".weight", ("I8",), ".weight"),
          {"SCB": (".SCB",)}, EightBit.of, {"format": (".weight_format",)}),
    QuantizationFormat("GPTQ, 2, 3, 4 and 8 bits, both formats", "`qweight`, `qzeros`, `scales`, `g_idx`",
          frozenset({"gptq"}), (".qweight", (), ".weight"),
          {"zeros": (".qzeros",), "scales": (".scales",)}, GPTQ.of, {"groups": (".g_idx",)}),
    QuantizationFormat("AWQ, 4 bits (gemm)", "`qweight`, `qzeros`, `scales`",
          frozenset({"awq"}), (".qweight", (), ".weight"),
          {"zeros": (".qzeros",), "scales": (".scales",)}, AWQ.of),
    QuantizationFormat("compressed-tensors int8", "`weight`, `weight_scale`",
          frozenset({"compressed-tensors"}), (".weight", ("I8",), ".weight"),
          {"quant_scale": (".weight_scale",)}, Scaled.of, {"zeros": (".weight_zero_point",)}),
    QuantizationFormat("compressed-tensors packed integers", "`weight_packed`, `weight_scale`, `weight_shape`",
          frozenset({"compressed-tensors"}), (".weight_packed", (), ".weight"),
          {"scales": (".weight_scale",), "shape": (".weight_shape",)}, PackedIntegers.of,
          {"zeros": (".weight_zero_point",), "groups": (".weight_g_idx",)}),
    QuantizationFormat("compressed-tensors NVFP4 and MXFP4", "`weight_packed`, `weight_scale`, `weight_global_scale` (NVFP4)",
          frozenset({"compressed-tensors"}), (".weight_packed", ("U8",), ".weight"),
          {"scales": (".weight_scale",)}, PackedFP4.of,
          {"divisor": (".weight_global_scale",), "extra": (".weight_zero_point", ".weight_g_idx")}),
    QuantizationFormat("ModelOpt NVFP4, stated in `config.json` or `hf_quant_config.json`", "`weight`, `weight_scale`, `weight_scale_2`",
          frozenset({"modelopt"}), (".weight", ("U8",), ".weight"),
          {"scales": (".weight_scale",), "factor": (".weight_scale_2",)}, PackedFP4.of, {"extra": (".pre_quant_scale",)}),
    QuantizationFormat("torchao FP8 e4m3: scale of a block, a row or the tensor", "`_weight_qdata`, `_weight_scale`",
          frozenset({"torchao"}), ("._weight_qdata", ("F8_E4M3",), ".weight"),
          {"quant_scale": ("._weight_scale",)}, torchao_weight, OPTIONAL, requantizes=True),
    QuantizationFormat("torchao int8 and fewer bits in bytes, int4 (plain)", "`_weight_qdata`, `_weight_scale`, `_weight_zero_point`",
          frozenset({"torchao"}), ("._weight_qdata", (), ".weight"),
          {}, torchao_weight, {"quant_scale": ("._weight_scale",), **OPTIONAL}),
    QuantizationFormat("HQQ, 1 to 8 bits, both axes", "`W_q`, `scale`, `zero`, `shape` and settings",
          frozenset({None, "hqq"}), (".W_q", (), ".weight"),
          {}, HQQ.of, {role: (f".{role}",) for role in ("scale", "zero", "shape", *SETTINGS, *UNSUPPORTED)}),
    QuantizationFormat("MXFP4 expert stacks", "`*_blocks`, `*_scales`",
          frozenset({None, "mxfp4"}), ("_blocks", ("U8",), ""),
          {"scales": ("_scales",)}, MXFP4.of),
)  # fmt: skip
"""Formats of quantized weights. To add one, add an entry here and its class in a module of this folder."""


def supported_method(quantization: Mapping[str, Any], where: str) -> str | None:
    """Read the ``quant_method`` of a quantization config; None for {}.

    Raises
    ------
    UnsupportedError
        If no format supports it, or another key changes what the quantized values mean.
    """
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"  # older versions of transformers left it out
    kind = repr(method)
    known = sorted({m for one in FORMATS for m in one.quant_methods if m is not None})
    if method in known:
        for key, good in _VARIANTS.get(str(method), {}).items():
            value = quantization.get(key)
            value = value.get("format", value) if isinstance(value, dict) else value
            if value and value not in good:
                kind += f" with {key}={value!r}" if isinstance(value, str | int) else f" with {key}"
                break
        else:
            return str(method)
    raise UnsupportedError(
        f"{where}: config.json: bases quantized by {kind} are not supported (supported: {', '.join(known)}); use the 16-bit model"
    )


_VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    # Keys that can change what the quantized values mean, with the settings that do not.
    "compressed-tensors": {
        "format": ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense", "nvfp4-pack-quantized",
                   "mxfp4-pack-quantized", "mxfp8-quantized"),
        "sparsity_config": ("dense",),
        "transform_config": (),
    },
    "modelopt": {"quant_algo": ("FP8", "FP8_PB_WO", "NVFP4")},
    "gptq": {"is_marlin_format": (), "rotation": ()},
}  # fmt: skip

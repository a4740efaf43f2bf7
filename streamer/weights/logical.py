"""Which logical weights a base has, and how each is encoded: one entry an encoding.

An entry says by names and dtypes which tensors on disk make one weight. The model's ``quantization_config`` must name a method that has
an entry; a tensor of codes that no entry claims is refused by name, so that codes never reach a computation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from streamer.errors import FormatError, UnsupportedError
from streamer.storage.checkpoint import Checkpoint
from streamer.weights.base import QuantizedWeight, StoredTensor, Weight
from streamer.weights.dtypes import Encoding
from streamer.weights.model_config import ModelConfig
from streamer.weights.plain import Plain
from streamer.weights.quantization.bitsandbytes import EightBit, FourBit
from streamer.weights.quantization.fp8 import FP8
from streamer.weights.quantization.grouped import AWQ, GPTQ, Packed
from streamer.weights.quantization.mxfp4 import MXFP4
from streamer.weights.quantization.scaled_codes import Scaled


@dataclass(frozen=True)
class QuantizationFormat:
    """One encoding.

    Attributes
    ----------
    title, stored
        For people: what it is, and what stands on disk.
    quant_methods
        Values of ``quant_method`` under which it is used; None among them where it needs no config.
    values
        How the name of the tensor of quantized values ends, its dtypes (none: any), and what the name of the weight ends with instead.
    companion_suffixes
        Other tensors, by role: how their names go on after the stem; the first that is there.
    optional
        The same for those that may be missing.
    make
        The weight that these tensors hold.
    recodes
        Whether `merge` writes merged weights back in this encoding.
    """

    title: str
    stored: str
    quant_methods: frozenset[str | None]
    values: tuple[str, tuple[str, ...], str]
    companion_suffixes: Mapping[str, tuple[str, ...]]
    make: Callable[[str, Mapping[str, StoredTensor], Mapping[str, Any]], QuantizedWeight]
    optional: Mapping[str, tuple[str, ...]] | None = None
    recodes: bool = False

    def claim(self, tensor: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, dict[str, str]] | None:
        """The weight's name and its tensors by role, if this tensor holds the codes of one."""
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
    QuantizationFormat("FP8 e4m3: scale of a block, a row or the tensor", "`weight`, `weight_scale_inv` or `weight_scale`",
          frozenset({None, "fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt"}), ("", ("F8_E4M3",), ""),
          {"scale": ("_scale_inv", "_scale")}, FP8.of, {"zeros": ("_zero_point",)}, recodes=True),
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
          {"scale": (".weight_scale",)}, Scaled.of, {"zeros": (".weight_zero_point",)}),
    QuantizationFormat("compressed-tensors packed integers", "`weight_packed`, `weight_scale`, `weight_shape`",
          frozenset({"compressed-tensors"}), (".weight_packed", (), ".weight"),
          {"scales": (".weight_scale",), "shape": (".weight_shape",)}, Packed.of,
          {"zeros": (".weight_zero_point",), "groups": (".weight_g_idx",)}),
    QuantizationFormat("MXFP4 expert stacks", "`*_blocks`, `*_scales`",
          frozenset({None, "mxfp4"}), ("_blocks", ("U8",), ""),
          {"scales": ("_scales",)}, MXFP4.of),
)  # fmt: skip
"""Encodings of codes, besides the plain one."""


class Weights(Mapping[str, Weight]):
    """The logical weights of a base by name, in its file order.

    What is made from it by `replaced`, `extended` and `dequantized` shares its table: several adapters on one base have one.

    Parameters
    ----------
    checkpoint
        The files.
    config
        The model's.

    Attributes
    ----------
    owners
        The weight's name and the role of each tensor on disk that is a part of codes.
    coded
        Names of the weights that stand as codes.

    Looking one up raises `UnsupportedError` if it is encoded in a way that has no entry.

    Raises
    ------
    UnsupportedError
        If the config names a way of quantization that has no entry.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.checkpoint = checkpoint
        self.quantization = config.quantization
        method = _method(self.quantization, f"{checkpoint.path}")
        tensors = {t.name: StoredTensor(f, t) for f in checkpoint.files.values() for t in f.header.tensors}
        self._made: dict[str, tuple[QuantizationFormat | None, dict[str, StoredTensor]]] = {}
        self.owners: dict[str, tuple[str, str]] = {}
        entries = [e for e in FORMATS if method in e.quant_methods]
        claimed = {}
        for name in tensors:
            for entry in entries:
                found = entry.claim(name, tensors)
                if found is not None:
                    claimed[name] = entry, *found
                    self.owners |= {tensor: (found[0], role) for role, tensor in found[1].items()}
                    break
        for name, stored in tensors.items():
            if name in claimed:
                entry, logical, roles = claimed[name]
                if logical in tensors and logical != name:
                    raise FormatError(
                        f"{stored.file.path}: tensors {name!r} and {logical!r} are the same weight; get the file again"
                    )
                self._made[logical] = entry, {role: tensors[tensor] for role, tensor in roles.items()}
            elif name not in self.owners:
                self._made[name] = None, {"weight": stored}

        self.coded = frozenset(name for name, (entry, _) in self._made.items() if entry is not None)
        self._order = {name: at for at, name in enumerate(self._made)}
        self._instead: dict[str, StoredTensor] = {}
        self._further: dict[str, Callable[[Weights], Weight]] = {}
        self._plain: Encoding | None = None

    def replaced(self, sources: Mapping[str, StoredTensor]) -> Weights:
        """The same with other tensors in the place of some, or beside them; they are written as those that they replace."""
        out = copy.copy(self)
        out._instead = {**self._instead, **sources}
        return out

    def extended(self, further: Mapping[str, Callable[[Weights], Weight]]) -> Weights:
        """The same with further names for parts of weights, or for several together; these are not among those iterated over."""
        out = copy.copy(self)
        out._further = {**self._further, **further}
        return out

    def dequantized(self, encoding: Encoding) -> Weights:
        """The same with what stands as codes written in a plain encoding."""
        out = copy.copy(self)
        out._plain = encoding
        return out

    def __getitem__(self, name: str) -> Weight:
        if name in self._further:
            return self._further[name](self)
        if name not in self._instead:
            return self._of_base(name)
        weight = Plain.of(self._instead[name])
        return replace(
            weight, name=name, encoding=self._of_base(name).encoding if name in self._made else weight.encoding
        )

    def _of_base(self, name: str) -> Weight:
        entry, tensors = self._made[name]
        if entry is None:
            return Plain.of(tensors["weight"])
        return replace(entry.make(name, tensors, self.quantization), encoding=self._plain)

    def __contains__(self, name: object) -> bool:
        return name in self._made or name in self._instead

    def __iter__(self) -> Iterator[str]:
        return iter({**self._made, **self._instead})

    def __len__(self) -> int:
        return len({**self._made, **self._instead})

    def place(self, name: str) -> int:
        """Where a weight comes in the file order; what does not stand in the base comes after all that does."""
        if name in self._order:
            return self._order[name]
        return len(self._order) + list(self._instead).index(name)

    def recodes(self, name: str) -> bool:
        """Whether merged values of a weight that stands as codes are written back as such."""
        entry, tensors = self._made[name]
        return (
            entry is not None and entry.recodes and len(tensors["weight"].info.shape) == 2 and name not in self._instead
        )


def _method(quantization: Mapping[str, Any], where: str) -> str | None:
    """The method, of one that has an entry."""
    if not quantization:
        return None
    method = quantization.get("quant_method")
    if method is None and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"  # as older versions of transformers wrote it
    kind = repr(method)
    known = sorted({m for entry in FORMATS for m in entry.quant_methods if m is not None})
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
    # What else changes the meaning of the codes: a key, and the values of it that do not.
    "compressed-tensors": {
        "format": ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense"),
        "sparsity_config": ("dense",),
        "transform_config": (),
    },
    "modelopt": {"quant_algo": ("FP8", "FP8_PB_WO")},
    "gptq": {"is_marlin_format": (), "rotation": ()},
}


def table() -> list[tuple[str, str, str, str]]:
    """For the README: encoding, what stands on disk, what `detect` and `mitigate` do, what `merge` does."""
    plain = ("BF16, F16, F32, F64", "`weight`", "read", "written, rounded once")
    return [
        plain,
        *(
            (e.title, e.stored, "read", "coded anew, or `--dequantize`" if e.recodes else "`--dequantize`")
            for e in FORMATS
        ),
    ]

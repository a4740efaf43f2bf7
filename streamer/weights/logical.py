"""Find a base's logical weights under the names of a plain checkpoint, in whatever tensors they are stored.

For GPTQ, the tensors ``q_proj.qweight``, ``q_proj.qzeros`` and ``q_proj.scales`` form the weight ``q_proj.weight``. A tensor that no
format of `quantization.registry` claims is a weight by itself.

Write a quantized model as plain weights of one dtype, and remove every sign of quantization from its config and files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from streamer.errors import FormatError, UnsupportedError
from streamer.storage.checkpoint import Checkpoint
from streamer.weights.base import ENCODINGS, Encoding, Plain, StoredTensor, Weight
from streamer.weights.model_config import ModelConfig
from streamer.weights.quantization.registry import FORMATS, QuantizationFormat, supported_method


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Tensors and format in which a base stores one logical weight.

    Attributes
    ----------
    index
        Its position in file order.
    tensors
        The tensors on disk, by role.
    format
        The quantization format; None for a plain tensor.
    """

    index: int
    tensors: Mapping[str, StoredTensor]
    format: QuantizationFormat | None


@dataclass(frozen=True, eq=False)
class WeightView(Mapping[str, Weight]):
    """Logical weights by name: the base's in file order, then those added to them.

    Views made of others share the base's table, so several adapters on one base need only one.
    Looking up a weight raises `UnsupportedError` if its tensors have a dtype that cannot be computed with.

    Attributes
    ----------
    checkpoint
        The base's files.
    quantization
        The model's quantization config; {} for a plain base.
    stored
        The base's weights by name, in file order.
    owners
        For each tensor that is part of a quantized weight: the weight's name, and the tensor's role in it.
    replacements
        Tensors that replace the base's weights of the same names, written in the replaced weight's dtype, or add new ones.
    derived
        Weights under new names that are computed from others, such as one expert's matrix from the tensors that hold its rows.
    encoding
        The plain encoding in which quantized weights are written back; None if they stay quantized.
    """

    checkpoint: Checkpoint
    quantization: Mapping[str, Any]
    stored: Mapping[str, StoredWeight]
    owners: Mapping[str, tuple[str, str]]
    replacements: Mapping[str, StoredTensor] = field(default_factory=dict)
    derived: Mapping[str, Callable[[WeightView], Weight]] = field(default_factory=dict)
    encoding: Encoding | None = None

    def replaced(self, sources: Mapping[str, StoredTensor]) -> WeightView:
        """Replace some weights by tensors, or add tensors."""
        return replace(self, replacements={**self.replacements, **sources})

    def extended(self, derived: Mapping[str, Callable[[WeightView], Weight]]) -> WeightView:
        """Add weights that are computed from others."""
        return replace(self, derived={**self.derived, **derived})

    def __getitem__(self, name: str) -> Weight:
        if name in self.derived:
            return self.derived[name](self)
        if name not in self.replacements:
            return self._of_base(name)
        weight = Plain.of(self.replacements[name])
        encoding = self._of_base(name).encoding if name in self.stored else weight.encoding
        return replace(weight, name=name, encoding=encoding)

    def _of_base(self, name: str) -> Weight:
        stored = self.stored[name]
        if stored.format is None:
            return Plain.of(stored.tensors["weight"])
        return replace(stored.format.make(name, stored.tensors, self.quantization), encoding=self.encoding)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor, also of one of integers, which have no `Weight`."""
        one = None if name in self.replacements or name in self.derived else self.stored[name]
        return self[name].shape if one is None or one.format is not None else one.tensors["weight"].info.shape

    def __contains__(self, name: object) -> bool:
        return name in self.stored or name in self.replacements or name in self.derived

    def __iter__(self) -> Iterator[str]:
        return iter({**self.stored, **self.replacements, **self.derived})

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def quantized_names(self) -> frozenset[str]:
        """Return the names of the base's weights that are stored quantized."""
        return frozenset(name for name, _ in self.owners.values())

    def file_index(self, name: str) -> int:
        """Return a weight's position in file order; weights that the base does not hold come last."""
        if name in self.stored:
            return self.stored[name].index
        return len(self.stored) + list(self.replacements).index(name)

    def requantizes(self, name: str) -> bool:
        """Test whether merged values of this quantized weight are written back quantized."""
        format_, tensors = self.stored[name].format, self.stored[name].tensors
        matrix = len(tensors["weight"].info.shape) == 2
        return format_ is not None and format_.requantizes and matrix and name not in self.replacements


def open_weights(checkpoint: Checkpoint, config: ModelConfig) -> WeightView:
    """Group the tensors of a base into logical weights, using only names and dtypes.

    Parameters
    ----------
    config
        The model's config.

    Raises
    ------
    UnsupportedError
        If no format supports the quantization method that the config names.
    FormatError
        If two sets of tensors form the same weight.
    """
    quantization = config.quantization
    method = supported_method(quantization, f"{checkpoint.path}")
    formats = [format_ for format_ in FORMATS if method in format_.quant_methods]
    tensors = {t.name: StoredTensor(f, t) for f in checkpoint.files.values() for t in f.header.tensors}
    claimed: dict[str, tuple[QuantizationFormat, str, dict[str, str]]] = {}
    owners: dict[str, tuple[str, str]] = {}
    for name in tensors:
        for format_ in formats:
            found = format_.claim(name, tensors)
            if found is not None:
                claimed[name] = format_, *found
                owners |= {tensor: (found[0], role) for role, tensor in found[1].items()}
                break
    stored: dict[str, StoredWeight] = {}
    for name, tensor in tensors.items():
        if name in claimed:
            format_, logical, roles = claimed[name]
            if logical in tensors and logical != name:
                raise FormatError(
                    f"{tensor.file.path}: tensors {name!r} and {logical!r} are the same weight; get the file again"
                )
            stored[logical] = StoredWeight(len(stored), {role: tensors[t] for role, t in roles.items()}, format_)
        elif name not in owners:
            stored[name] = StoredWeight(len(stored), {"weight": tensor}, None)
    return WeightView(checkpoint, quantization, stored, owners)


STALE = {"quantize_config.json", "quant_config.json", "hf_quant_config.json"}
"""Files that make some loaders treat a model as quantized."""

# Scales of activations and caches.
_ACTIVATION_SCALE = re.compile(r"(^|[._])(input|output|activation|[qkv]|kv)_(global_scale|scale|zero_point)(_ub)?$")

# Dtypes of quantized values. Integers count only with two or more dimensions; with one they are indices.
_QUANTIZED = re.compile(r"^(F8_|F6_|F4)")
_INTEGERS = {"I8", "U8", "I16", "U16", "I32", "U32"}

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def plain_weights(weights: WeightView, config: ModelConfig) -> WeightView:
    """Make quantized weights be written as plain ones, in the dtype of the model's config or in bfloat16.

    Raises
    ------
    UnsupportedError
        If some quantized values have no known format.
    """
    for name, info in ((t.name, t) for f in weights.checkpoint.files.values() for t in f.header.tensors):
        quantized = _QUANTIZED.match(info.dtype) or (info.dtype in _INTEGERS and len(info.shape) > 1)
        if quantized and name not in weights.owners and not is_activation_scale(name, weights):
            raise UnsupportedError(
                f"{weights.checkpoint.path}: tensor {name!r}: dtype {info.dtype} with no scale or table that could decode it; "
                "use the 16-bit model"
            )
    # The config states a dtype as ``torch.float16`` or ``float16``.
    stated = (_DTYPES.get(str(value).removeprefix("torch.")) for value in config.stated("dtype", "torch_dtype"))
    return replace(weights, encoding=ENCODINGS[next(filter(None, stated), "BF16")])


def plain_metadata(metadata: Mapping[str, str], weights: WeightView) -> dict[str, str]:
    """Remove what torchao states of each tensor from a file's metadata."""
    return {key: text for key, text in metadata.items() if key != "tensor_names" and key not in weights}


def is_activation_scale(name: str, weights: WeightView) -> bool:
    """Test whether a tensor scales a quantized model's activations or caches, and so has no use in a plain model."""
    return bool(weights.owners) and bool(_ACTIVATION_SCALE.search(name))

"""Find the logical weights of a base: by the names of a plain checkpoint, whatever tensors store them.

Before → after, for GPTQ: the tensors ``q_proj.qweight``, ``q_proj.qzeros`` and ``q_proj.scales`` → the weight ``q_proj.weight``. A tensor
that no format of `quantization.registry` claims is a weight of its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from streamer.errors import FormatError
from streamer.storage.checkpoint import Checkpoint
from streamer.weights.base import StoredTensor, Weight
from streamer.weights.dtypes import Encoding
from streamer.weights.model_config import ModelConfig
from streamer.weights.plain import Plain
from streamer.weights.quantization.registry import FORMATS, QuantizationFormat, supported_method


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Tensors and format in which a base stores one logical weight.

    Attributes
    ----------
    index
        Its number in file order.
    tensors
        The tensors on disk, by role.
    form
        The format of quantized values; None for a plain tensor.
    """

    index: int
    tensors: Mapping[str, StoredTensor]
    form: QuantizationFormat | None


@dataclass(frozen=True, eq=False)
class WeightView(Mapping[str, Weight]):
    """Logical weights by name: the base's in file order, then what was added to them.

    A view that is made from another by `replaced`, `extended` or `dequantized` shares the base's table: several adapters on one base have
    one. Looking a weight up raises `UnsupportedError` where its tensors have a dtype that cannot be computed with.

    Attributes
    ----------
    checkpoint
        The base's files.
    quantization
        The model's quantization config, {} for a plain base.
    stored
        The base's weights by name, in file order.
    owners
        For each tensor that is part of a quantized weight: the weight's name, and the tensor's role in it.
    replacements
        Tensors in the place of the base's weights of these names, or added to them; written in the dtype of those that they replace.
    derived
        Weights under names of their own that are made of others: an expert's matrix, from the tensors that hold its rows.
    encoding
        The encoding in which quantized weights are written back plain; None where they stay quantized.
    """

    checkpoint: Checkpoint
    quantization: Mapping[str, Any]
    stored: Mapping[str, StoredWeight]
    owners: Mapping[str, tuple[str, str]]
    replacements: Mapping[str, StoredTensor] = field(default_factory=dict)
    derived: Mapping[str, Callable[[WeightView], Weight]] = field(default_factory=dict)
    encoding: Encoding | None = None

    def replaced(self, sources: Mapping[str, StoredTensor]) -> WeightView:
        """Put tensors in the place of some weights, or add them."""
        return replace(self, replacements={**self.replacements, **sources})

    def extended(self, derived: Mapping[str, Callable[[WeightView], Weight]]) -> WeightView:
        """Add weights that are made of others."""
        return replace(self, derived={**self.derived, **derived})

    def dequantized(self, encoding: Encoding) -> WeightView:
        """Have quantized weights written in a plain encoding."""
        return replace(self, encoding=encoding)

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
        if stored.form is None:
            return Plain.of(stored.tensors["weight"])
        return replace(stored.form.make(name, stored.tensors, self.quantization), encoding=self.encoding)

    def __contains__(self, name: object) -> bool:
        return name in self.stored or name in self.replacements or name in self.derived

    def __iter__(self) -> Iterator[str]:
        return iter({**self.stored, **self.replacements, **self.derived})

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def quantized_names(self) -> frozenset[str]:
        """List the names of the base's weights that are stored quantized."""
        return frozenset(name for name, _ in self.owners.values())

    def file_index(self, name: str) -> int:
        """Number a weight by file order; one that the base does not hold comes after all that it holds."""
        if name in self.stored:
            return self.stored[name].index
        return len(self.stored) + list(self.replacements).index(name)

    def requantizes(self, name: str) -> bool:
        """Test whether merged values of a quantized weight are written back quantized."""
        form, tensors = self.stored[name].form, self.stored[name].tensors
        matrix = len(tensors["weight"].info.shape) == 2
        return form is not None and form.requantizes and matrix and name not in self.replacements


def open_weights(checkpoint: Checkpoint, config: ModelConfig) -> WeightView:
    """Group the tensors of a base into logical weights, by names and dtypes alone.

    Parameters
    ----------
    config
        The model's.

    Raises
    ------
    UnsupportedError
        If the config names a method of quantization that no format has.
    FormatError
        If two sets of tensors are one weight.
    """
    quantization = config.quantization
    method = supported_method(quantization, f"{checkpoint.path}")
    forms = [form for form in FORMATS if method in form.quant_methods]
    tensors = {t.name: StoredTensor(f, t) for f in checkpoint.files.values() for t in f.header.tensors}
    claimed: dict[str, tuple[QuantizationFormat, str, dict[str, str]]] = {}
    owners: dict[str, tuple[str, str]] = {}
    for name in tensors:
        for form in forms:
            found = form.claim(name, tensors)
            if found is not None:
                claimed[name] = form, *found
                owners |= {tensor: (found[0], role) for role, tensor in found[1].items()}
                break
    stored: dict[str, StoredWeight] = {}
    for name, tensor in tensors.items():
        if name in claimed:
            form, logical, roles = claimed[name]
            if logical in tensors and logical != name:
                raise FormatError(
                    f"{tensor.file.path}: tensors {name!r} and {logical!r} are the same weight; get the file again"
                )
            stored[logical] = StoredWeight(len(stored), {role: tensors[t] for role, t in roles.items()}, form)
        elif name not in owners:
            stored[name] = StoredWeight(len(stored), {"weight": tensor}, None)
    return WeightView(checkpoint, quantization, stored, owners)

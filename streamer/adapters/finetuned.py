"""Use a fully fine-tuned model as an adapter: its deltas are the differences between the two models, matrix by matrix.

Weights of two or more dimensions become modules of the method ``FULL`` with delta ``W1 − W0``. Other tensors (norms, biases, embeddings of
another size) replace the base's tensors, as an adapter's saved modules do:
``model.layers.0.mlp.up_proj.weight`` (m, n) → module ``model.layers.0.mlp.up_proj``; ``model.norm.weight`` (n,) → carried, ``saved``.
A stack of experts yields one module for each expert:
``model.layers.0.mlp.experts.down_proj`` (8, m, n) → ``….down_proj[0]`` … ``….down_proj[7]``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.adapter_config import CONFIG_NAME, AdapterConfig
from streamer.adapters.modules import MethodModule, Module
from streamer.adapters.peft_methods import METHODS
from streamer.adapters.tensor_names import Carried
from streamer.errors import InputError
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, checkpoint_identity, open_checkpoint
from streamer.storage.header import TensorInfo
from streamer.storage.identities import AdapterIdentity
from streamer.storage.tensor_file import IOMode, sampled_bytes
from streamer.units import listed
from streamer.weights.base import StoredTensor
from streamer.weights.dtypes import ENCODINGS
from streamer.weights.model_config import MODEL_CONFIG, ModelConfig, read_model_config

METHOD = "FULL"


@dataclass(frozen=True)
class ExpertStack:
    """Tensor that holds one matrix for each expert.

    Attributes
    ----------
    tensor
        Name of the tensor.
    stored
        Its shape: (experts, out, in), or (experts, in, out) if `transposed`.
    experts
        One module for each expert.
    """

    tensor: str
    stored: tuple[int, ...]
    transposed: bool
    experts: tuple[MethodModule, ...]


@dataclass(frozen=True)
class FinetunedModel(DeltaSource):
    """Fine-tuned model on disk.

    Attributes
    ----------
    model_config
        Values of its ``config.json``.
    stacks
        Its stacks of experts.
    carried_matrices
        Tensors of two or more dimensions, with the base's shape, that are carried along.
    copies
        Names of tensors that are stored under another name as well and are therefore left out.
    """

    model_config: ModelConfig = field(default_factory=ModelConfig)
    stacks: tuple[ExpertStack, ...] = ()
    carried_matrices: tuple[str, ...] = ()
    copies: frozenset[str] = frozenset()

    describes_model = True

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Return every tensor except the copies, by name."""
        return {name: stored for name, stored in super().tensors.items() if name not in self.copies}

    def without(self, copies: Collection[str]) -> FinetunedModel:
        """Return this model without tensors that are copies of others."""
        modules = {name: m for name, m in self.modules.items() if f"{name}.weight" not in copies}
        carried = tuple(c for c in self.carried if c.source not in copies)
        carried_matrices = tuple(name for name in self.carried_matrices if name not in copies)
        return replace(
            self, modules=modules, carried=carried, carried_matrices=carried_matrices, copies=frozenset(copies)
        )

    @property
    def identity_bytes(self) -> int:
        """Return the number of bytes of headers and samples."""
        return sampled_bytes(self.files)

    def identity(self) -> AdapterIdentity:
        """Digest headers and samples, as for a base."""
        files = checkpoint_identity({file.path.name: file for file in self.files})["files"]
        return {"files": files, "modules": len(self.modules)}

    def trains(self, module: str) -> bool:
        """Return True: the whole model was trained."""
        return True

    @property
    def notes(self) -> tuple[str, ...]:
        """Name the matrices that are carried along without being judged."""
        if not self.carried_matrices:
            return ()
        return (f"matrices carried along without findings: {listed(map(repr, self.carried_matrices))}",)

    def stored_sum(self, module: Module) -> StoredTensor | None:
        """Return the model's own weight."""
        assert isinstance(module, MethodModule)
        (tensor,) = module.tensor_names
        return module.stored(self.tensors[tensor])


def is_model(path: Path) -> bool:
    """Test whether a path given as an adapter is a model's directory."""
    holds = path.is_dir() and any((path / name).exists() for name in (SINGLE_NAME, INDEX_NAME))
    return holds and not (path / CONFIG_NAME).exists()


def open_finetuned(path: Path, base: Checkpoint, role_of: Callable[[TensorInfo], str], io: IOMode) -> FinetunedModel:
    """Open a fine-tuned model as deltas of a base.

    Parameters
    ----------
    role_of
        Returns a tensor's role in its layer: ``weight`` if stored (out, in, …), ``conv1d`` if stored (in, out), or ``embedding``. For
        a stack of experts it returns the order in which each matrix is stored, ``out,in`` or ``in,out``; for anything else "".

    Raises
    ------
    InputError
        If the model is the base itself.
    """
    model_config = read_model_config(path)
    tuned = open_checkpoint(path, io)
    if {f.stamp for f in tuned.files.values()} == {f.stamp for f in base.files.values()}:
        raise InputError(f"{path}: is the base itself; name the adapter, or the model that was trained from the base")
    config = AdapterConfig({**model_config.values, "peft_type": METHOD}, path / MODEL_CONFIG)
    modules: dict[str, Module] = {}
    carried: list[Carried] = []
    stacks: list[ExpertStack] = []
    carried_matrices: list[str] = []
    for file in tuned.files.values():
        for info in file.header.tensors:
            module, _, parameter = info.name.rpartition(".")
            resized = info.name in base.weight_map and base.info(info.name).shape != info.shape
            role = role_of(info) if info.dtype in ENCODINGS and not resized else ""
            if role in ("out,in", "in,out"):
                stacks.append(_stack(info, role == "in,out", config))
            elif role:
                modules[module] = MethodModule(module, METHODS[METHOD], config, {role: info.name}, {role: info.shape})
            else:
                carried.append(Carried("saved", module, parameter, info.name))
                matrix = info.dtype in ENCODINGS and sum(n > 1 for n in info.shape) > 1
                if matrix and not resized and not parameter.endswith("bias"):
                    carried_matrices.append(info.name)
    files = tuple(tuned.files.values())
    return FinetunedModel(
        path, config, files, modules, tuple(carried), (), model_config, tuple(stacks), tuple(carried_matrices)
    )


def _stack(info: TensorInfo, transposed: bool, config: AdapterConfig) -> ExpertStack:
    experts, *stored = info.shape
    m, n = reversed(stored) if transposed else stored
    role = "conv1d" if transposed else "weight"
    whole = MethodModule(info.name, METHODS[METHOD], config, {role: info.name}, {role: tuple(stored)}, shape=(m, n))
    modules = (replace(whole, name=f"{info.name}[{e}]", expert=e) for e in range(experts))
    return ExpertStack(info.name, info.shape, transposed, tuple(modules))

"""A fully fine-tuned model in an adapter's place: its deltas are the differences of the two models, matrix by matrix.

Its weights of two and more dimensions are modules of the method ``FULL``, whose delta is ``W1 − W0``; its other tensors (norms, biases,
embeddings of another size) take the place of the base's, as an adapter's saved modules do:
``model.layers.0.mlp.up_proj.weight`` (m, n) → module ``model.layers.0.mlp.up_proj``; ``model.norm.weight`` (n,) → carried, ``saved``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.adapter_config import CONFIG_NAME, AdapterConfig
from streamer.adapters.layer_names import EMBEDDING
from streamer.adapters.modules import MethodModule, Module
from streamer.adapters.peft_methods import METHODS
from streamer.adapters.tensor_names import Carried
from streamer.errors import InputError
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, checkpoint_identity, open_checkpoint
from streamer.storage.identities import AdapterIdentity
from streamer.storage.tensor_file import IOMode, sampled_bytes
from streamer.weights.base import StoredTensor
from streamer.weights.dtypes import ENCODINGS
from streamer.weights.model_config import MODEL_CONFIG, ModelConfig, read_model_config

METHOD = "FULL"


@dataclass(frozen=True)
class FinetunedModel(DeltaSource):
    """A fine-tuned model on disk.

    Attributes
    ----------
    model_config
        Its ``config.json``.
    """

    model_config: ModelConfig = field(default_factory=ModelConfig)

    describes_model = True

    @property
    def identity_bytes(self) -> int:
        """Bytes of headers and samples."""
        return sampled_bytes(self.files)

    def identity(self) -> AdapterIdentity:
        """Digest headers and samples, as a base's."""
        files = checkpoint_identity({file.path.name: file for file in self.files})["files"]
        return {"files": files, "modules": len(self.modules)}

    def trains(self, module: str) -> bool:
        """True: all of the model was trained."""
        return True

    def stored_sum(self, module: Module) -> StoredTensor | None:
        """Return the model's own weight."""
        (tensor,) = module.tensor_names
        return self.tensors[tensor]


def is_model(path: Path) -> bool:
    """Say whether a path that is to be an adapter is a model's directory."""
    holds = path.is_dir() and any((path / name).exists() for name in (SINGLE_NAME, INDEX_NAME))
    return holds and not (path / CONFIG_NAME).exists()


def open_finetuned(path: Path, base: Checkpoint, is_conv1d: Callable[[str], bool], io: IOMode) -> FinetunedModel:
    """Open a fine-tuned model as deltas of a base.

    Parameters
    ----------
    is_conv1d
        Whether a module of this name is stored (in, out).

    Raises
    ------
    InputError
        If it is the base itself.
    """
    model_config = read_model_config(path)
    tuned = open_checkpoint(path, io)
    if {f.stamp for f in tuned.files.values()} == {f.stamp for f in base.files.values()}:
        raise InputError(f"{path}: is the base itself; name the adapter, or the model that was trained from the base")
    config = AdapterConfig({**model_config.values, "peft_type": METHOD}, path / MODEL_CONFIG)
    modules: dict[str, Module] = {}
    carried: list[Carried] = []
    for file in tuned.files.values():
        for info in file.header.tensors:
            module, _, parameter = info.name.rpartition(".")
            resized = info.name in base.weight_map and base.info(info.name).shape != info.shape
            if parameter == "weight" and len(info.shape) >= 2 and info.dtype in ENCODINGS and not resized:
                if len(info.shape) == 2 and EMBEDDING.search(module):
                    role = "embedding"
                else:
                    role = "conv1d" if len(info.shape) == 2 and is_conv1d(module) else "weight"
                modules[module] = MethodModule(module, METHODS[METHOD], config, {role: info.name}, {role: info.shape})
            else:
                carried.append(Carried("saved", module, parameter, info.name))
    return FinetunedModel(path, config, tuple(tuned.files.values()), modules, tuple(carried), (), model_config)

"""A fully fine-tuned model in an adapter's place: what it changes is the difference of the two models, matrix by matrix.

Its weights of two and more dimensions are modules of the method ``FULL``, whose delta is ``W1 − W0``; its other tensors (norms, biases,
embeddings of another size) take the place of the base's, as an adapter's saved modules do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamer.adapters.adapter import CONFIG_NAME, Adapter
from streamer.adapters.layer_names import EMBEDDING, HEADS
from streamer.adapters.modules import Carried, MethodModule, Module
from streamer.errors import InputError
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, open_checkpoint
from streamer.storage.tensor_file import IOMode
from streamer.weights.dtypes import ENCODINGS

METHOD = "FULL"


def is_model(path: Path) -> bool:
    """Whether a path that is to be an adapter is a model's directory."""
    return (
        path.is_dir()
        and not (path / CONFIG_NAME).exists()
        and ((path / SINGLE_NAME).exists() or (path / INDEX_NAME).exists())
    )


def open_tuned(path: Path, base: Checkpoint, config: dict[str, Any], conv1d: bool, io: IOMode) -> Adapter:
    """Open a fine-tuned model as what it adds to a base.

    Parameters
    ----------
    config
        The tuned model's ``config.json``.
    conv1d
        Whether the model's linear layers are stored (in, out).

    Raises
    ------
    InputError
        If it is the base itself.
    """
    tuned = open_checkpoint(path, io)
    if {f.stamp for f in tuned.files.values()} == {f.stamp for f in base.files.values()}:
        raise InputError(f"{path}: is the base itself; name the adapter, or the model that was trained from the base")
    modules: dict[str, Module] = {}
    carried: list[Carried] = []
    for file in tuned.files.values():
        for info in file.header.tensors:
            module, _, parameter = info.name.rpartition(".")
            resized = info.name in base.weight_map and base.info(info.name).shape != info.shape
            if parameter == "weight" and len(info.shape) >= 2 and info.dtype in ENCODINGS and not resized:
                last = module.rpartition(".")[2]
                role = (
                    "embedding"
                    if len(info.shape) == 2 and EMBEDDING.search(module)
                    else "conv1d"
                    if conv1d and last not in HEADS
                    else "weight"
                )
                modules[module] = MethodModule(module, METHOD, {role: info.name}, {role: info.shape}, 0, 1.0)
            else:
                carried.append(Carried("saved", module, parameter, info.name))
    config_path = path / "config.json"
    return Adapter(path, {**config, "peft_type": METHOD}, tuple(tuned.files.values()), modules, tuple(carried),
                   config_path if config_path.exists() else None)  # fmt: skip

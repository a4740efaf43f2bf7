"""Use a fully fine-tuned model as an adapter: its deltas are the differences between the two models, matrix by matrix.

Weights of two or more dimensions become modules of the method ``FULL`` with delta ``W1 − W0``. Other tensors (norms, biases, embeddings of
another size) replace the base's tensors, as an adapter's saved modules do:
``model.layers.0.mlp.up_proj.weight`` (m, n) → module ``model.layers.0.mlp.up_proj``; ``model.norm.weight`` (n,) → carried, ``saved``.
A stack of experts yields one module for each expert:
``model.layers.0.mlp.experts.down_proj`` (8, m, n) → ``….down_proj[0]`` … ``….down_proj[7]``.

`AdapterPaths` also places the outputs. For one adapter, the output is the path that the user names. For several, that path is a directory,
and each output in it is named after its adapter's directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from streamer.adapters.adapter import Carried, DeltaSource
from streamer.adapters.adapter_config import CONFIG_NAME, LORA_NAME, WEIGHTS_NAME, AdapterConfig
from streamer.adapters.modules import PEFT_METHODS, MethodModule, Module
from streamer.errors import InputError, OutputExistsError, UsageError
from streamer.storage import checkpoint
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from streamer.storage.files import AdapterIdentity
from streamer.storage.header import TensorInfo
from streamer.storage.local_source import IOMode
from streamer.storage.transaction import refuse_symlink
from streamer.units import listed
from streamer.weights.base import FLOATS, StoredTensor
from streamer.weights.model_config import MODEL_CONFIG, ModelConfig, read_model_config

METHOD = "FULL"


@dataclass(frozen=True)
class FinetunedModel(DeltaSource):
    """Fine-tuned model on disk.

    Attributes
    ----------
    model_config
        Values of its ``config.json``.
    stacks
        Its stacks of experts, each as the module of one expert under the stack's name.
    carried_matrices
        Tensors of two or more dimensions, with the base's shape, that are carried along.
    copies
        Names of tensors that are stored under another name as well and are therefore left out.
    """

    model_config: ModelConfig = field(default_factory=ModelConfig)
    stacks: tuple[MethodModule, ...] = ()
    carried_matrices: tuple[str, ...] = ()
    copies: frozenset[str] = frozenset()

    describes_model = True

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Return every tensor except the copies, by name."""
        return {name: stored for name, stored in super().tensors.items() if name not in self.copies}

    def without(self, copies: Collection[str]) -> FinetunedModel:
        """Return this model without tensors that are copies of others."""
        return replace(
            self,
            modules={name: m for name, m in self.modules.items() if f"{name}.weight" not in copies},
            carried=tuple(c for c in self.carried if c.source not in copies),
            carried_matrices=tuple(name for name in self.carried_matrices if name not in copies),
            copies=frozenset(copies),
        )

    @property
    def parameters(self) -> list[str]:
        """List the names by which to search a base for the stacks of experts."""
        return [stack.name.removesuffix(".weight") for stack in self.stacks]

    def identity(self) -> AdapterIdentity:
        """Digest headers and samples, as for a base."""
        files = {file.path.name: file for file in self.files}
        identity = checkpoint.checkpoint_identity(files)
        return {"files": identity["files"], "modules": len(self.modules)}

    @property
    def notes(self) -> tuple[str, ...]:
        """Name the matrices that are carried along without being judged."""
        if not self.carried_matrices:
            return ()
        return (
            f"matrices carried along without findings: {listed(map(repr, self.carried_matrices))}",
        )

    def stored_sum(self, module: Module) -> StoredTensor | None:
        """Return the model's own weight."""
        assert isinstance(module, MethodModule)
        (tensor,) = module.tensor_names
        return module.stored(self.tensors[tensor])


def is_model(path: Path) -> bool:
    """Test whether a path given as an adapter is a model's directory."""
    holds = path.is_dir() and any((path / name).exists() for name in (SINGLE_NAME, INDEX_NAME))
    return holds and not (path / CONFIG_NAME).exists()


def open_finetuned(
    path: Path, base: Checkpoint, role_of: Callable[[TensorInfo], str], io: IOMode
) -> FinetunedModel:
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
    tuned = checkpoint.open_checkpoint(path, io)
    files = tuple(tuned.files.values())
    if {file.stamp for file in files} == {file.stamp for file in base.files.values()}:
        raise InputError(
            f"{path}: is the base itself; name the adapter, or the model that was trained from the base"
        )
    config = AdapterConfig({**model_config.values, "peft_type": METHOD}, path / MODEL_CONFIG)
    full = PEFT_METHODS[METHOD]
    modules = {}
    carried = []
    stacks = []
    matrices = []
    for info in (info for file in files for info in file.header.tensors):
        name = info.name
        module, _, parameter = name.rpartition(".")
        resized = name in base.weight_map and base.info(name).shape != info.shape
        is_float = info.dtype in FLOATS
        role = role_of(info) if is_float and not resized else ""
        if role in ("out,in", "in,out"):
            a, b = stored = info.shape[1:]
            if role == "out,in":
                kind = "weight"
                shape = (a, b)
            else:
                kind = "conv1d"
                shape = (b, a)
            stacks.append(
                MethodModule(name, full, config, {kind: name}, {kind: stored}, shape=shape)
            )
        elif role:
            modules[module] = MethodModule(module, full, config, {role: name}, {role: info.shape})
        else:
            carried.append(Carried("saved", module, parameter, name))
            is_matrix = is_float and sum(n > 1 for n in info.shape) > 1
            if is_matrix and not resized and not parameter.endswith("bias"):
                matrices.append(name)
    return FinetunedModel(
        path,
        config,
        files,
        modules,
        tuple(carried),
        model_config=model_config,
        stacks=tuple(stacks),
        carried_matrices=tuple(matrices),
    )


FILES = (CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin", LORA_NAME)
"""A directory that has any of these files is an adapter, complete or not."""

T = TypeVar("T")


class ByName(dict[str, T]):
    """Results for several adapters, by name."""


@dataclass(frozen=True)
class AdapterPaths:
    """Paths of adapters, by name and in order.

    Attributes
    ----------
    single
        Whether it is one adapter that was named by itself: its output is then the named path, and no directory of outputs.
    """

    by_name: Mapping[str, Path]
    single: bool = False

    @classmethod
    def of_one(cls, path: str | Path) -> AdapterPaths:
        """Make them of one adapter."""
        return cls({Path(path).name: Path(path)}, single=True)

    @property
    def paths(self) -> list[Path]:
        """List the paths."""
        return list(self.by_name.values())

    def directories(self, output: Path) -> list[Path]:
        """List the directory for each adapter's model or adapter.

        Raises
        ------
        OutputError
            If the path for several is a file or a symlink.
        """
        if self.single:
            return [output]
        refuse_symlink(output)
        if output.exists() and not output.is_dir():
            raise OutputExistsError(
                f"{output}: for several adapters -o is a directory, found a file; name a directory",
                output,
            )
        return [output / name for name in self.by_name]

    def findings_files(self, output: Path) -> list[Path]:
        """List the file for each adapter's findings, of several all in one directory; see `directories`."""
        if self.single:
            return [output]
        return [path.with_name(f"{path.name}.safetensors") for path in self.directories(output)]

    def collected(self, results: Sequence[T]) -> T | ByName[T]:
        """Return the only result, or the results by name."""
        return results[0] if self.single else ByName(zip(self.by_name, results, strict=True))


def one_or_several(adapters: str | Path | Sequence[str | Path]) -> AdapterPaths:
    """Decide by the argument: a list, or a directory of adapters, means several."""
    if not isinstance(adapters, str | Path):
        return AdapterPaths(named_adapters(adapters))
    if holds_adapters(adapters):
        return AdapterPaths(named_adapters([adapters]))
    return AdapterPaths.of_one(adapters)


def holds_adapters(path: str | Path) -> bool:
    """Test whether a path is a directory of adapters: neither an adapter nor a model, but with adapters inside."""
    path = Path(path)
    return not _is_adapter(path) and not is_model(path) and bool(_inside(path))


def named_adapters(adapters: Sequence[str | Path]) -> dict[str, Path]:
    """List adapters by name, in the order given; a directory of adapters stands for all adapters in it, sorted.

    Incomplete adapters are included: opening one reports what is missing. Other directories are skipped.

    Raises
    ------
    UsageError
        If there are none, one is given twice, two have the same name, or a directory of adapters contains a model.
    """
    by_name: dict[str, Path] = {}
    for root in map(Path, adapters):
        inside = [root]
        if holds_adapters(root):
            inside = _inside(root)
            # The user may mean a model as a fine-tuned model, or it may be the base.
            models = (p.name for p in _directories(root) if is_model(p) and not _is_adapter(p))
            if model := min(models, default=""):
                raise UsageError(
                    f"{root}: holds a model beside the adapters, {model!r}; list the adapters one by one"
                )
        for path in inside:
            name = Path(os.path.abspath(path)).name.removesuffix(".safetensors")
            if name in by_name:
                if os.path.realpath(path) == os.path.realpath(by_name[name]):
                    raise UsageError(f"{path}: is given twice; name it once")
                collide = f"has the same name as {by_name[name]}, so their outputs would collide"
                raise UsageError(f"{path}: {collide}; rename one, or run it separately")
            by_name[name] = path
    if not by_name:
        raise UsageError("adapters: expected at least one, found none")
    return by_name


def _inside(path: Path) -> list[Path]:
    return sorted(p for p in _directories(path) if _is_adapter(p))


def _directories(path: Path) -> list[Path]:
    return [p for p in path.glob("*") if p.is_dir() and not p.name.startswith(".")]


def _is_adapter(path: Path) -> bool:
    """Test whether any of an adapter's files exists, even as a broken link."""
    return any(os.path.lexists(path / name) for name in FILES)

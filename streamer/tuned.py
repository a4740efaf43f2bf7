"""A fully fine-tuned model in an adapter's place: what it changes is the difference of the two models, matrix by matrix.

Its weights of two and more dimensions are modules of the method ``FULL``, whose delta is ``W1 − W0``; its other tensors (norms, biases,
embeddings of another size) take the place of the base's, as an adapter's saved modules do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.adapter import CONFIG_NAME, Adapter
from streamer.bases.weight import Part
from streamer.changes import EMBEDDING, HEADS, Changes
from streamer.encodings import ENCODINGS
from streamer.errors import InputError, UnsupportedError
from streamer.modules import Carried, MethodModule, Module
from streamer.renames import Renames
from streamer.storage.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, open_checkpoint
from streamer.storage.tensorfile import IOMode
from streamer.tied import OF_A_TIE, equal, find_tie, refuse_other_ties

METHOD = "FULL"

PREFIX = "base_model.model."
"""What PEFT's names begin with."""


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


@dataclass(frozen=True)
class Beside:
    """What stands in a LoRA adapter beside its factors, and how its modules are called.

    Attributes
    ----------
    names
        Module → its name in a loaded model, where that is another one.
    carried
        Tensor's name in the adapter → what it holds.
    config
        What the config says of it.
    heads
        Embedding's module → the lm_head that is tied to it, and takes the same delta.
    """

    names: Mapping[str, str]
    carried: Mapping[str, Part]
    config: Mapping[str, Any]
    heads: Mapping[str, str]


def beside_factors(
    tuned: Adapter, base: Checkpoint, matched: Mapping[str, str], changes: Changes, renames: Renames
) -> Beside:
    """How a LoRA adapter says what of a fine-tuned model is no delta of a matrix.

    PEFT knows the modules by their names in a loaded model; a bias is its module's own where that has factors; what else has changed
    is a saved module, with all of its tensors; an embedding and its lm_head stay tied. What has not changed is left out.

    Parameters
    ----------
    matched
        Module → base tensor of those that have factors.

    Raises
    ------
    UnsupportedError
        If something changed that has no place in a LoRA adapter.
    """
    now = renames.at_run_time(tuned.parts)
    names = {m: now.get(f"{m}.weight", f"{m}.weight").removesuffix(".weight") for m in matched}
    bases = {part.info.name: Part(*base.locate(n)) for n, part in changes.sources.items() if n in base.weight_map}
    changed = {
        c.source: c for c in tuned.carried if c.source not in bases or not equal(tuned.parts[c.source], bases[c.source])
    }
    inner = {name.rpartition(".")[0].rpartition(".")[0] for name in tuned.parts}
    saved = set()
    for c in changed.values():
        if c.module in matched and c.parameter == "bias":
            continue
        if c.module in matched or c.source not in now or any(f"{i}.".startswith(f"{c.module}.") for i in inner):
            raise UnsupportedError(
                f"{tuned.path}: {c.source!r} has changed, which is no weight or bias of a layer, and so has no place in a LoRA adapter; "
                "use `streamer merge`"
            )
        saved.add(now[c.source].rpartition(".")[0])
    carried = {}
    for c in tuned.carried:
        name = now.get(c.source, c.source)
        module, _, parameter = name.rpartition(".")
        # By PEFT's rule, an entry of modules_to_save names all modules whose path ends in it.
        if any(module.endswith(s) for s in saved):
            saved.add(module)
            carried[PREFIX + name] = tuned.parts[c.source]
        elif c.source in changed:
            carried[f"{PREFIX}{module}.base_layer.{parameter}"] = tuned.parts[c.source]
    tie = find_tie(tuned.parts, tuned.config, tuned)
    trained = {
        m: f"{m}.weight"
        for m, n in matched.items()
        if OF_A_TIE.search(f"{m}.weight") and not equal(tuned.parts[f"{m}.weight"], Part(*base.locate(n)))
    }
    refuse_other_ties(tie, tuned.path, tuned.parts, tuned.config, tuned, trained, changed)
    heads, one = {}, tie is not None and tie.head not in tuned.parts
    if tie is not None and one:
        head = renames.at_run_time([tie.head]).get(tie.head, tie.head).removesuffix(".weight")
        heads = {m: head for m in matched if f"{m}.weight" == tie.embedding}
        if not heads and now.get(tie.embedding, "").removesuffix(".weight") in saved:  # of another size than the base's
            saved.add(head)
            carried[f"{PREFIX}{head}.weight"] = tuned.parts[tie.embedding]
    config: dict[str, Any] = {"modules_to_save": sorted(saved)} if saved else {}
    if one:
        config["ensure_weight_tying"] = True
    return Beside(names, carried, config, heads)

"""List side files: the files of a model's or adapter's directory that an output copies, and the files that it leaves out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from streamer.storage.checkpoint import component_files
from streamer.units import listed

# Weights in other formats would remain the old ones beside the new weights; training state belongs to the old adapter.
_STALE = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ggml|mlmodel|pb|tflite)(\.index\.json)?$|^streamer\.json$"
)
_SKIPPED_DIRECTORIES = re.compile(
    r"^(\.git|\.cache|__pycache__|checkpoint-\d+|global_step\d+|runs|onnx|openvino|original|coreml|metal)$"
)

# Weights beside an adapter's that no adapter's loader reads, but a trainer's own may: a projector, new embeddings, a value head. Neither
# the adapter in an earlier format nor a whole model nor training state is one.
_UNREAD = re.compile(
    r"^(?!adapter_model|(pytorch_)?model(-\d|_fsdp|\.)|optimizer|sampler\.|scaler|training_args|random_states|custom_checkpoint|loss\.|"
    r"rng_state|.*(scheduler|_states?)[._]).*\.(safetensors|bin|pt|pth|ckpt)$"
)

# What sentence-transformers saves besides a transformer: a list of the modules, their folders, and settings.
_MODULES = re.compile(r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json|\d+_\w+/.*")

_VARIANT_INDEX = re.compile(r"\.safetensors\.index\.[^/]+\.json$")

READ = (
    "config.json", "generation_config.json", "*processor_config.json", "*quant*config*.json", "*sentence*.json", "adapter_config.json",
    "tokenizer*.json", "*vocab*.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "modules.json", "tekken.json", "params.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "*.py",
)  # fmt: skip
"""Patterns of files beside the weights that loaders read, under fixed names or because a config or a class names them."""


def goes_along(name: str) -> bool:
    """Test whether an output would copy a model's file, given by its relative name; see `other_files`."""
    *directories, last = name.split("/")
    hidden = any(_SKIPPED_DIRECTORIES.match(part) for part in directories) or last.startswith(".streamer.")
    return not hidden and (bool(directories) or not _STALE.search(last))


def other_files(directory: Path | None, apart: Path | None = None) -> list[tuple[str, Path]]:
    """List the files that an output copies: (relative name, path), sorted; symlinks are followed.

    Not copied: weights in other formats beside the safetensors, which would be stale, and their copies for other runtimes; trainers' state;
    `.git` and caches; files of an unfinished run of streamer; and `apart` with everything below it. Without a directory there are none.
    """
    return [(name, path) for name, path, stays in _walk(directory, apart) if not stays]


def stale_weights(names: Iterable[str], components: Collection[str]) -> list[str]:
    """List the weights in other formats and precisions beside components that get new weights."""
    return [
        name
        for name in names
        if (component := name.rpartition("/")[0]) in components
        and (_STALE.search(name) or _VARIANT_INDEX.search(name))
        and name != component_files(component)[1]
    ]


def skipped_files(directory: Path, apart: Path | None = None) -> list[str]:
    """List what `other_files` leaves out, by relative name: files, and whole directories."""
    return [name for name, _, stays in _walk(directory, apart) if stays]


def unread_weights(adapter: Path | None, own: str) -> tuple[str, ...]:
    """Note the weights in an adapter's directory, beside its `own` file, that PEFT does not load; a folder with a config is a model's."""
    found = [
        name
        for name, path, _ in _walk(adapter)
        if _UNREAD.match(path.name) and name != own and not is_module(name)
        and (path.parent == adapter or not any(path.parent.glob("*config.json")))
    ]  # fmt: skip
    it = "it" if len(found) == 1 else "them"
    why = f"not used, because PEFT does not load {it}; if the adapter's trainer does, the result lacks {it}"
    return (f"{listed(found)} beside the adapter: {why}",) if found else ()


def is_module(name: str) -> bool:
    """Test whether a file, given by its relative name, belongs to the modules that sentence-transformers runs after a transformer."""
    return _MODULES.fullmatch(name) is not None


def with_modules(copies: list[tuple[str, Path]], adapter: Path) -> tuple[list[tuple[str, Path]], list[str]]:
    """Replace the modules that sentence-transformers runs after the transformer by the adapter's, if it was saved with some.

    Returns
    -------
    copies, warnings
        The files that a merged model takes along, and a warning if modules are missing.
    """
    try:
        modules = json.loads((adapter / "modules.json").read_bytes())
        # Normalize has no file, so that older versions saved an empty folder, which git and the hub drop.
        folders = [adapter / module["path"] for module in modules if not module["type"].endswith("Normalize")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return copies, []
    missing = [folder.name for folder in folders if not folder.is_dir()]
    lacks = f"modules.json beside the adapter names {listed(missing)}, not found: the base's modules are used"
    if missing or not folders:
        return copies, [lacks] if missing else []
    own = [c for c in other_files(adapter) if is_module(c[0])]
    return sorted([*own, *(c for c in copies if not is_module(c[0]))]), []


def read_beside(directory: Path, names: Collection[str]) -> list[str]:
    """List the top-level files that a loader would read beside an output's own; for an adapter, neither code nor ``config.json``."""
    found = {p.name for pattern in READ for p in directory.glob(pattern) if p.is_file() and not p.name.startswith(".")}
    of_model = {name for name in found if name == "config.json" or name.endswith(".py")}
    return sorted(found - {*names, *(of_model if "adapter_config.json" in names else ())})


def _walk(directory: Path | None, apart: Path | None = None) -> Iterator[tuple[str, Path, bool]]:
    """Yield the files below a directory by relative name, and whether each is left out; whole directories may be left out."""
    if directory is None:
        return
    hidden = None if apart is None else apart.resolve()

    def walk(at: Path, above: frozenset[Path]) -> Iterator[tuple[str, Path, bool]]:
        for path in sorted(at.iterdir()):
            name, real = str(path.relative_to(directory)), Path(os.path.realpath(path))  # of a loop of links too
            if real == hidden or real in above:  # following a link to a parent directory would never end
                continue
            if path.is_dir() and not _SKIPPED_DIRECTORIES.match(path.name):
                yield from walk(path, above | {real})
            elif path.is_dir():
                yield name, path, True
            elif path.is_file() and not path.name.startswith(".streamer."):
                # Below the top, weights belong to separate modules (such as sentence-transformers' 2_Dense).
                yield name, path, at == directory and bool(_STALE.search(path.name))

    yield from walk(directory, frozenset({directory.resolve()}))

"""Name the inputs of an output.

Names are directory names, hub ids if known, and digests, but never paths, so the same inputs give the same bytes on any machine.

Note if an adapter's config names another base than the one in use.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

from streamer.json_types import Keywords
from streamer.storage.files import AdapterIdentity, BaseIdentity
from streamer.storage.remote_source import read_manifest
from streamer.weights.model_config import ModelConfig

DIGEST_CHARACTERS = 16
"""Hexadecimal characters of an input's digest: enough to distinguish inputs, short enough to read aloud."""


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

DIRECTORIES = {"base", "checkpoint", "checkpoints", "ckpt", "ckpts", "data", "exp", "experiments", "hf_models", "llms", "merged", "model",
               "models", "my_models", "out", "output", "outputs", "pretrain", "pretrained", "results", "runs", "save", "saves", "tmp",
               "weights"}  # fmt: skip
"""Names of directories that commonly contain models, as opposed to owners on the hub."""


# Words of a name that do not distinguish models: encodings, and common words for copies.
_SPARE = re.compile(
    r"(?<![a-z0-9])(?:gptq|awq|mxfp4|nvfp4|bnb|bitsandbytes|nf4|fp4|fp8|f8|gguf|q[2-8]_\w+|hqq|aqlm|eetq|exl[23]|quip|higgs|autoround|"
    r"[348]-?bit|int[48]|w[48]a(?:8|16)|unsloth|quantized|dequantized|merged|hf|fp16|bf16|fp32)(?![a-z0-9])"
)
_VARIANTS = {"base", "chat", "instruct", "it", "thinking", "reasoning"}
_WORD = re.compile(r"\d+(?:x\d+)?(?:\.\d+)*[bm](?![a-z0-9])|\d+(?:\.\d+)*|[a-z]+")


# fmt: off
class NameSource(TypedDict, total=False):
    """Name and identity of an input."""
    name: Annotated[str, "Name of the directory or file; for a model in the hub's cache, the last part of its id. Never a path."]
    address: Annotated[str, "Address that it was read from, as given, without secrets; for the hub, see the next two keys."]
    model_id: Annotated[str, "Id on the hub, if known from the path of the cache, or from a config's name for it that ends in its name."]
    revision: Annotated[str, "Revision on the hub, if known."]
    digest: Annotated[str, Keywords(pattern="^[0-9a-f]{16}$"), "The first 16 digits of a SHA-256 that identifies the input."]
# fmt: on


class BaseSource(NameSource, BaseIdentity):
    """The base model: its name, and what identifies it independently of its location."""


class AdapterSource(NameSource, AdapterIdentity):
    """The adapter, or the fine-tuned model used as one, described in the same way."""


def base_source(path: Path, config: ModelConfig, stated: object, identity: Mapping[str, Any]) -> BaseSource:
    """Name a base; `stated` is the name that the adapter's config gives its base.

    The id is the one of the hub's cache if the base is in it, else the name in the adapter's config or the base's own, provided that its
    last part is the directory's name: the base's config may name the model from which it was trained, and the adapter's another model.
    """
    model_id = hub_id(stated, path) or hub_id(config.values.get("_name_or_path"), path)
    return cast(BaseSource, _source(path, identity, model_id))


def adapter_source(path: Path, identity: Mapping[str, Any]) -> AdapterSource:
    """Name an adapter, or a fine-tuned model used as one."""
    # A config may name its base by a path.
    unnamed = {k: v for k, v in identity.items() if k != "base_model_name_or_path"}
    source = cast(AdapterSource, _source(path, unnamed))
    named = identity.get("base_model_name_or_path")
    if isinstance(named, str) and re.fullmatch(rf"{HUB_ID.pattern}|[A-Za-z0-9][\w.-]*", named):
        source["base_model_name_or_path"] = named
    return source


def _source(path: Path, identity: Mapping[str, Any], model_id: str | None = None) -> dict[str, Any]:
    cached = cached_model(path)
    # JSON cannot hold bytes that are not UTF-8.
    source: dict[str, Any] = {"name": os.fsencode(path.resolve().name).decode(errors="backslashreplace")}
    if cached is not None:
        source = {"name": cached[0].rpartition("/")[2], "model_id": cached[0], "revision": cached[1]}
    elif (manifest := read_manifest(path if path.is_dir() else path.parent)) is not None:
        source["address"] = manifest.address
    if model_id is not None:
        source.setdefault("model_id", model_id)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return {**source, "digest": digest[:DIGEST_CHARACTERS], **identity}


def in_short(source: NameSource) -> dict[str, str]:
    """Return a source's name, id, revision and digest, without its identity."""
    return {key: str(source[key]) for key in ("name", "model_id", "revision", "digest") if key in source}


def hub_id(stated: object, path: Path) -> str | None:
    """Return a config's name for a model if it can be taken as the hub id, ``owner/name``, of the model at `path`; else None.

    A relative path of two parts looks like an id. It is taken as an id if it ends in the model's name, but not if it is the path of this
    model or starts with a usual name for a directory of models. Whether other paths exist does not matter, so the same inputs get the same
    names wherever a run starts.
    """
    if not isinstance(stated, str) or not HUB_ID.fullmatch(stated):
        return None
    owner, _, name = stated.partition("/")
    lies = path.resolve()
    if name != lies.name or owner == lies.parent.name or owner.lower() in DIRECTORIES:
        return None
    return stated


def cached_model(path: Path) -> tuple[str, str] | None:
    """Return the id and revision of a model in the hub's cache, ``models--OWNER--NAME/snapshots/REVISION``; else None."""
    parts = path.resolve().parts
    for at in range(len(parts) - 2):
        if parts[at].startswith("models--") and parts[at + 1] == "snapshots":
            return parts[at].removeprefix("models--").replace("--", "/"), parts[at + 2]
    return None


def other_base(stated: object, path: Path, config: ModelConfig) -> list[str]:
    """Note if the adapter's config clearly names another model than the base in use, at a path.

    People choose names freely, so few names prove anything: only a hub id, or a name that states a size. Case, owners, encodings and words
    such as "merged" do not count, and neither do additional words in one of the names, unless they name a variant such as "instruct".
    """
    cached = cached_model(path)
    names = [cached[0]] if cached else [path.resolve().name, config.values.get("_name_or_path")]
    trained_on, *others = (_plain(name) for name in (stated, *names))
    others = [name for name in others if _words(name) and name.lower() not in DIRECTORIES]
    telling = [name for name in others if "/" in name or _sizes(_words(name))]
    told = "/" in trained_on or _sizes(_words(trained_on))
    if not told or not telling or any(_may_be_same(_words(trained_on), _words(name)) for name in others):
        return []
    return [
        f"the adapter's config names {trained_on!r} as its base, but the base given here is {telling[0]!r}; check that the adapter was "
        "trained on this model"
    ]


def _plain(stated: object) -> str:
    """Return a hub id unchanged or taken from a path into the hub's cache; for any other path return the last part."""
    text = stated.replace("\\", "/").rstrip("/") if isinstance(stated, str) else ""
    cached = re.search(r"models--([^/]+)/snapshots/", text)
    text = cached[1].replace("--", "/") if cached else text.partition("@")[0]
    is_id = HUB_ID.fullmatch(text) and text.partition("/")[0].lower() not in DIRECTORIES
    return text if is_id else text.rpartition("/")[2]


def _words(name: str) -> set[str]:
    """Split a name into the words, numbers and sizes that distinguish its model: ``Llama3-8B`` has the same as ``Llama-3-8B``."""
    return set(_WORD.findall(_SPARE.sub("", name.rpartition("/")[2].lower())))


def _sizes(words: Iterable[str]) -> set[str]:
    """List the numbers of parameters, such as 8b, 0.5b or 8x7b."""
    return {word for word in words if word[0].isdigit() and word[-1].isalpha()}


def _may_be_same(a: set[str], b: set[str]) -> bool:
    """Test whether one name has the other's words, with equal variants and equal sizes if both state one."""
    if a & _VARIANTS != b & _VARIANTS or (_sizes(a) and _sizes(b) and _sizes(a) != _sizes(b)):
        return False
    a, b = a - _sizes(a), b - _sizes(b)
    return a <= b or b <= a

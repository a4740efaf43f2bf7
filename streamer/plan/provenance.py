"""Compare the base on which an adapter was trained with the base in use, by their names and encodings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from streamer.weights.model_config import ModelConfig

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_NAME = re.compile(rf"{_ID.pattern}|[A-Za-z0-9][\w.-]*")

DIRECTORIES = {"base", "checkpoint", "checkpoints", "ckpt", "ckpts", "data", "exp", "experiments", "hf_models", "llms", "merged", "model",
               "models", "my_models", "out", "output", "outputs", "pretrain", "pretrained", "results", "runs", "save", "saves", "tmp",
               "weights"}  # fmt: skip
"""Names of directories that commonly contain models, as opposed to owners on the hub."""

# Words in the names of quantized copies that state the encoding; each pattern matches a whole word.
NAMED = (
    (r"gptq", "gptq"),
    (r"awq", "awq"),
    (r"mxfp4", "mxfp4"),
    (r"nvfp4", "nvfp4"),
    (r"bnb|bitsandbytes|nf4|fp4", "bitsandbytes"),
    (r"fp8|f8", "fp8"),
    (r"gguf|q[2-8]_(?:k|0|1)\w*", "gguf"),
    (r"hqq", "hqq"),
    (r"aqlm|eetq|exl[23]|quip|higgs|autoround", "another quantization"),
    (r"[348]-?bit|int[48]|w[48]a(?:8|16)", "integers of few bits"),
)


_SPARE = re.compile(
    rf"(?:^|(?<=[-_.]))(?:{'|'.join(pattern for pattern, _ in NAMED)}|unsloth|quantized|dequantized|merged|hf|fp16|bf16|fp32)(?=$|[-_.])"
)
"""Words of a name that do not distinguish models: encodings, and common words for copies."""

_VARIANT = re.compile(r"(?:^|(?<=[-_.]))(?:base|chat|instruct|it|thinking|reasoning)(?=$|[-_.])")
"""Words that distinguish models of the same name."""

_SIZE = re.compile(r"(?<![a-z0-9.])(?:\d+x)?\d+(?:\.\d+)?[bm](?![a-z0-9])")
"""Number of parameters in a name, such as 8B, 0.5B or 8x7B."""

_WORD = re.compile(r"\d+(?:x\d+)?(?:\.\d+)*[bm](?![a-z0-9])|\d+(?:\.\d+)*|[a-z]+")
"""Word or number of a name: ``Llama3-8B`` has the same words as ``Llama-3-8B``."""

LEAST_CORE = 4
"""Least number of letters and digits in a name that is searched for in another name."""


def base_notes(trained_on: object, path: Path, config: ModelConfig, metadata: Mapping[str, str]) -> list[str]:
    """Note how the base in use at a path differs from the base that the adapter's config names; see `base_names`."""
    encodings = provenance_notes(trained_on, config, path.resolve().name)
    return [*encodings, *other_base_notes(trained_on, base_names(path, config, metadata))]


def named_encoding(name: str) -> str:
    """Return the quantization that a model's name mentions; empty if it mentions none."""
    last = PurePosixPath(name.replace("\\", "/")).name
    for pattern, method in NAMED:
        if re.search(rf"(?:^|[-_.])(?:{pattern})(?:$|[-_.])", last, re.IGNORECASE):
            return method
    return ""


def stored_encoding(config: ModelConfig) -> str:
    """Return the quantization that a model's ``config.json`` states; empty if it states none."""
    entry = config.quantization
    return str(entry.get("quant_method") or "quantization of an unnamed kind") if entry else ""


def provenance_notes(trained_on: object, base_config: ModelConfig, base_name: str) -> list[str]:
    """Note, one line each, if the adapter was trained on another encoding of the base than the one in use.

    Parameters
    ----------
    trained_on
        The base, as named in the adapter's config.
    base_name
        The name of the base in use: if the adapter's config states the same name, there is nothing to note.
    """
    if not isinstance(trained_on, str) or not trained_on:
        return []
    last = PurePosixPath(trained_on.replace("\\", "/")).name
    named, stored = named_encoding(trained_on), stored_encoding(base_config)
    if bool(named) == bool(stored) or (stored and last == base_name):
        return []
    if named:
        return [
            f"the adapter was trained on {trained_on!r}, a quantized model by its name ({named}), but the base given here is not "
            "quantized: the adapter is applied to these weights, which differ from those in training by the quantization error"
        ]
    return [
        f"the adapter was trained on {trained_on!r}, by its name not quantized, but the base given here is in {stored}: the adapter is "
        "applied to these weights, which differ from those in training by the quantization error (unless training quantized them on "
        "loading, as QLoRA does; the config does not record this)"
    ]


def other_base_notes(trained_on: object, names: Iterable[object]) -> list[str]:
    """Note if the adapter's config clearly names another model than the base in use.

    People choose names freely, so few names prove anything: only a hub id, or a name that states a size. Case, owners, encodings and words
    such as "merged" do not count, and neither do additional words in one of the names, unless they name a variant such as "instruct".

    Parameters
    ----------
    trained_on
        The base, as named in the adapter's config.
    names
        Names of the base in use; one that may mean the same model is enough.
    """
    stated = _plain(trained_on)
    others = [name for name in map(_plain, names) if _core(name) and name.lower() not in DIRECTORIES]
    telling = [name for name in others if _tells(name)]
    if not _tells(stated) or not telling or any(_may_be_same(stated, name) for name in others):
        return []
    return [
        f"the adapter's config names {stated!r} as its base, but the base given here is {telling[0]!r}; check that the adapter was "
        "trained on this model"
    ]


def _plain(stated: object) -> str:
    """Return a hub id unchanged or taken from a path into the hub's cache; for any other path return the last part."""
    text = stated.replace("\\", "/").rstrip("/") if isinstance(stated, str) else ""
    cached = re.search(r"models--([^/]+)/snapshots/", text)
    text = cached[1].replace("--", "/") if cached else text.partition("@")[0]
    is_id = _ID.fullmatch(text) and text.partition("/")[0].lower() not in DIRECTORIES
    return text if is_id else text.rpartition("/")[2]


def _tells(name: str) -> bool:
    """Test whether a name identifies its model for everyone."""
    return "/" in name or _SIZE.search(name.lower()) is not None


def _core(name: str) -> list[str]:
    """Split a name into the words and numbers that distinguish its model from others."""
    return _WORD.findall(_SPARE.sub("", name.rpartition("/")[2].lower()))


def _may_be_same(a: str, b: str) -> bool:
    """Test whether one name has the other's words in the same order, with equal variants and equal sizes if both state one."""
    variants, sizes = ([set(pattern.findall(name.lower())) for name in (a, b)] for pattern in (_VARIANT, _SIZE))
    if variants[0] != variants[1] or (all(sizes) and sizes[0] != sizes[1]):
        return False
    words = [[word for word in _core(name) if all(sizes) or not _SIZE.fullmatch(word)] for name in (a, b)]
    short, long = sorted(words, key=len)
    left = iter(long)
    return short == long or (all(word in left for word in short) and sum(map(len, short)) >= LEAST_CORE)


def base_names(path: Path, config: ModelConfig, metadata: Mapping[str, str]) -> list[object]:
    """List a base's names: its id if it is in the hub's cache; else its directory's and config's, and for a merged model its base's.

    Parameters
    ----------
    metadata
        Metadata of one of the base's safetensors files.
    """
    if (cached := cached_model(path)) is not None:
        return [cached[0]]
    try:
        merged = json.loads(metadata.get("streamer", "{}"))["base"]
        earlier = [merged["name"], merged.get("model_id")]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        earlier = []  # written by another program
    return [path.resolve().name, config.values.get("_name_or_path"), *earlier]


def mitigated_before(metadata: Mapping[str, str]) -> list[str]:
    """Note if `mitigate` made the adapter: any λ other than 1 would scale its intruders twice.

    Parameters
    ----------
    metadata
        Metadata of the adapter's safetensors file.
    """
    try:
        made = json.loads(metadata.get("streamer", ""))
        if made["command"] != "mitigate" or made["lambda"] == 1:
            return []
        by = f"lambda {float(made['lambda']):g} and " if made["lambda"] is not None else ""
        how = f"by `streamer mitigate` from {made['adapter']['name']!r}, with {by}method {made['method']}"
    except (KeyError, TypeError, ValueError, RecursionError):
        return []  # written by another program
    return [f"the adapter is mitigated already, {how}: lambda 1 leaves it unchanged, any other is applied in addition"]


def hub_id(stated: object, path: Path) -> str | None:
    """Return a config's name for a model if it can be taken as the hub id, ``owner/name``, of the model at `path`; else None.

    A relative path of two parts looks like an id. It is taken as an id if it ends in the model's name, but not if it is the path of this
    model or starts with a usual name for a directory of models. Whether other paths exist does not matter, so the same inputs get the same
    names wherever a run starts.
    """
    if not isinstance(stated, str) or not _ID.fullmatch(stated):
        return None
    owner, _, name = stated.partition("/")
    lies = path.resolve()
    if name != lies.name or owner == lies.parent.name or owner.lower() in DIRECTORIES:
        return None
    return stated


def stated_name(stated: object) -> str | None:
    """Return a config's name for a model if it is a plain name or looks like an id, and not a path on some machine; else None."""
    return stated if isinstance(stated, str) and _NAME.fullmatch(stated) else None


def cached_model(path: Path) -> tuple[str, str] | None:
    """Return the id and revision of a model in the hub's cache, ``models--OWNER--NAME/snapshots/REVISION``; else None."""
    parts = path.resolve().parts
    for at in range(len(parts) - 2):
        if parts[at].startswith("models--") and parts[at + 1] == "snapshots":
            return parts[at].removeprefix("models--").replace("--", "/"), parts[at + 2]
    return None

"""Refuse adapters, and warn of them, by their files and the base's: what their configs announce, and which base they name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from streamer.adapters.adapter import DeltaSource
from streamer.adapters.adapter_config import CONFIG_NAME
from streamer.errors import FormatError
from streamer.plan.architectures import Architecture, architecture_for
from streamer.plan.carried_tensors import LABEL_TASKS, TensorEdits, auto_class
from streamer.plan.name_matching import Renames
from streamer.plan.sources import DIRECTORIES, HUB_ID, cached_model
from streamer.units import listed
from streamer.weights.model_config import ModelConfig

# Words of a name that do not distinguish models: encodings, and common words for copies.
_SPARE = re.compile(
    r"(?<![a-z0-9])(?:gptq|awq|mxfp4|nvfp4|bnb|bitsandbytes|nf4|fp4|fp8|f8|gguf|q[2-8]_\w+|hqq|aqlm|eetq|exl[23]|quip|higgs|autoround|"
    r"[348]-?bit|int[48]|w[48]a(?:8|16)|unsloth|quantized|dequantized|merged|hf|fp16|bf16|fp32)(?![a-z0-9])"
)
_VARIANTS = {"base", "chat", "instruct", "it", "thinking", "reasoning"}
_WORD = re.compile(r"\d+(?:x\d+)?(?:\.\d+)*[bm](?![a-z0-9])|\d+(?:\.\d+)*|[a-z]+")


def check_announced(adapter: DeltaSource, names: Collection[str], renames: Renames, config: ModelConfig,
                    architecture: Architecture | None, edits: TensorEdits, biased: Collection[str]) -> tuple[str, ...]:  # fmt: skip
    """Compare what an adapter's config announces with what its file holds: PEFT fills the gaps with values that nobody trained.

    Parameters
    ----------
    names
        All names of the base's tensors, including names of tied tensors, in the order of messages.
    edits
        Edits that the adapter's other tensors make.
    biased
        The adapter's modules whose layers have a bias in the base.

    Returns
    -------
    tuple of str
        A note if the file lacks the biases that ``bias`` announces: PEFT before 0.21 saved none for ``lora_only``.

    Raises
    ------
    FormatError
        If the file lacks tensors that only the adapter can supply; the message names all of them.
    """
    stated, missing = adapter.config, []
    saved = {c.name for c in adapter.carried if c.role == "saved"}
    # A file may hold more than the model loads, such as a mask that earlier versions called ``attn.bias``.
    tensors = {
        tensor: now
        for tensor, now in renames.at_run_time(names).items()
        if ((architecture is not None and architecture.has_tensor(now)) or f"{tensor.removesuffix('bias')}weight" in names
            or tensor.endswith(".weight")) and not _is_behind(now, config)
    }  # fmt: skip
    # PEFT adds the names of common heads for a task, and the model has only one of them: an entry alone announces nothing.
    for entry in stated.strings("modules_to_save"):
        below = [t for t, now in tensors.items() if _is_below(now, entry)]
        lacking = [t for t in below if t not in edits.sources and tensors[t] not in saved]
        if not below:
            lacking = _missing_of_head(entry, saved, config, stated.get("task_type"))
        if lacking:
            missing.append(f"{listed(map(repr, lacking), 1)} of {entry!r} in modules_to_save")
    rows = stated.get("trainable_token_indices")
    found = {c.module: list(c.indices) for c in adapter.carried if c.role == "tokens"}
    for module, indices in rows.items() if isinstance(rows, dict) else [("the embedding", rows)]:
        # PEFT saves only one of several tied modules with the same rows.
        if indices and not any(f".{m}".endswith(f".{module}") or found[m] == indices for m in found):
            missing.append(f"the rows of {module!r} in trainable_token_indices")
    shifted = {c.module for c in adapter.carried if c.role == "lora_bias"}
    # Some programs write biases only for layers that have one; PEFT takes missing ones as zero.
    if stated.get("lora_bias") and (lacking := [f"{name}.lora_B.bias" for name in biased if name not in shifted]):
        missing.append(f"{listed(map(repr, lacking), 1)} of lora_bias")
    if missing:
        raise FormatError(
            f"{adapter.file.path}: lacks tensors that {CONFIG_NAME} announces: {listed(missing, separator='; ')}; save the "
            "adapter again with PEFT's save_pretrained"
        )
    count = {"all": sum(t.endswith(".bias") for t in tensors), "lora_only": len(biased)}.get(str(stated.get("bias")), 0)
    brought, notes = sum(c.parameter == "bias" for c in adapter.carried), _untargeted(adapter, renames)
    if brought < count:
        notes.append(
            f"the adapter's bias is {stated.get('bias')!r}, but its file has {brought} of {count} biases: the base's values are kept"
        )
    return tuple(notes)


def _untargeted(adapter: DeltaSource, renames: Renames) -> list[str]:
    """Note modules with factors that the config does not target."""
    config = adapter.config
    named, excluded = {*config.strings("target_modules")}, tuple(f".{m}" for m in config.strings("exclude_modules"))
    if not named or config.get("target_parameters") or config.get("ensure_weight_tying"):
        return []
    now = renames.at_run_time([f"{name}.weight" for name in adapter.modules])
    paths = {name: {name, now.get(f"{name}.weight", name).removesuffix(".weight")} for name in adapter.modules}
    stated = config.get("layers_to_transform")
    layers = {str(layer) for layer in (stated if isinstance(stated, list) else [stated]) if layer is not None}
    found = [
        name for name, names in paths.items()
        if not any(f".{n}".endswith(f".{target}") for n in names for target in named) or f".{name}".endswith(excluded)
        or (layers and layers.isdisjoint(name.split(".")) and names.isdisjoint(named))
    ]  # fmt: skip
    return [f"PEFT ignores the factors of {listed(map(repr, found))}, which target_modules, exclude_modules or layers_to_transform leave "
            "out; streamer applies them: correct the config, or remove the factors"] if found else []  # fmt: skip


def _missing_of_head(entry: str, saved: set[str], config: ModelConfig, task: object) -> list[str]:
    """List the missing tensors of a task's head that the base does not have: PEFT's loader needs every one.

    LayoutLMv3's has one layer, or two inside it: so a module counts as present if the file has tensors of a module inside or around it.
    """
    cls = auto_class(config.model_type, task) if task in LABEL_TASKS else None
    architecture = None if cls is None else architecture_for(config, cls)
    there = {name.rpartition(".")[0] for name in saved if _is_below(name, entry)}
    tensors = set() if architecture is None else {*architecture.tensors} - saved
    lacking = {n: n.rpartition(".")[0] for n in tensors if "*" not in n and _is_below(n, entry)}
    return sorted(
        n for n, m in lacking.items() if not any(m.startswith(f"{t}.") or t.startswith(f"{m}.") for t in there)
    )


def _is_behind(name: str, config: ModelConfig) -> bool:
    """Test whether a tensor belongs to a layer after the last that the config counts (multi-token prediction): no class loads it."""
    layers, found = config.values.get("num_hidden_layers"), re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    return found is not None and type(layers) is int and int(found[1]) >= layers


def _is_below(tensor: str, entry: str) -> bool:
    """Test whether a tensor is in a module that an entry of modules_to_save names by the end of its path, as PEFT matches it."""
    steps = tensor.split(".")[:-1]
    return any(".".join(steps[:i]).endswith(entry) for i in range(1, len(steps) + 1))


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

"""Decide on everything beside the weights: which files an output copies, whose tokenizer it takes, and how it names its inputs.

Inputs are named by directory names, hub ids if known, and digests, never by paths: the same inputs give the same bytes on any machine.

Trainers save their tokenizer beside the adapter: it may have more tokens, another padding token or another chat template.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypedDict, cast

from streamer.json_types import Keywords
from streamer.storage.atomic_file import PARTIAL
from streamer.storage.checkpoint import component_files
from streamer.storage.files import AdapterIdentity, BaseIdentity
from streamer.storage.remote_source import read_manifest
from streamer.units import listed
from streamer.weights.model_config import ModelConfig

if TYPE_CHECKING:  # it loads torch, and verify reads lists of files without it
    from streamer.adapters.adapter import DeltaSource

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
_MODULES = re.compile(
    r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json|\d+_\w+/.*"
)

# Files of an unfinished run or download of streamer.
_OWN = re.compile(rf"^\.streamer\.|{PARTIAL.pattern}")

_VARIANT_INDEX = re.compile(r"\.safetensors\.index\.[^/]+\.json$")

READ = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "*quant*config*.json",
    "*sentence*.json",
    "adapter_config.json",
    "tokenizer*.json",
    "*vocab*.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "modules.json",
    "tekken.json",
    "params.json",
    "*.jinja",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.py",
)
"""Patterns of files beside the weights that loaders read, under fixed names or because a config or a class names them."""


Copies = list[tuple[str, Path]]
"""Files by relative name."""


def goes_along(name: str) -> bool:
    """Test whether an output would copy a model's file, given by its relative name; see `other_files`."""
    *directories, last = name.split("/")
    hidden = any(_SKIPPED_DIRECTORIES.match(part) for part in directories) or bool(_OWN.match(last))
    return not hidden and (bool(directories) or not _STALE.search(last))


def other_files(directory: Path | None, apart: Path | None = None) -> Copies:
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


def unread_weights(adapter: Path | None, weights_name: str) -> tuple[str, ...]:
    """Note the weights in an adapter's directory, beside its own file, that PEFT does not load; a folder with a config is a model's."""
    unread = [
        name
        for name, path, _ in _walk(adapter)
        if _UNREAD.match(path.name)
        and name != weights_name
        and not is_module(name)
        and (path.parent == adapter or not any(path.parent.glob("*config.json")))
    ]
    it = "it" if len(unread) == 1 else "them"
    why = f"not used, because PEFT does not load {it}; if the adapter's trainer does, the result lacks {it}"
    return (f"{listed(unread)} beside the adapter: {why}",) if unread else ()


def is_module(name: str) -> bool:
    """Test whether a file, given by its relative name, belongs to the modules that sentence-transformers runs after a transformer."""
    return _MODULES.fullmatch(name) is not None


def with_modules(copies: Copies, adapter: Path) -> tuple[Copies, list[str]]:
    """Replace the modules that sentence-transformers runs after the transformer by the adapter's, if it was saved with some.

    Returns
    -------
    copies, warnings
        The files that a merged model takes along, and a warning if modules are missing.
    """
    try:
        modules = json.loads((adapter / "modules.json").read_bytes())
        # Normalize has no file, so that older versions saved an empty folder, which git and the hub drop.
        folders = [
            adapter / module["path"]
            for module in modules
            if not module["type"].endswith("Normalize")
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return copies, []
    missing = [folder.name for folder in folders if not folder.is_dir()]
    lacks = f"modules.json beside the adapter names {listed(missing)}, not found: the base's modules are used"
    if missing or not folders:
        return copies, [lacks] if missing else []
    of_adapter = [c for c in other_files(adapter) if is_module(c[0])]
    return sorted([*of_adapter, *(c for c in copies if not is_module(c[0]))]), []


def read_beside(directory: Path, names: Collection[str]) -> list[str]:
    """List the top-level files that a loader would read beside an output's own; for an adapter, neither code nor ``config.json``."""
    paths = (path for pattern in READ for path in directory.glob(pattern) if path.is_file())
    names_read = {path.name for path in paths if not path.name.startswith(".")}
    of_model = {name for name in names_read if name == "config.json" or name.endswith(".py")}
    return sorted(names_read - {*names, *(of_model if "adapter_config.json" in names else ())})


def _walk(directory: Path | None, apart: Path | None = None) -> Iterator[tuple[str, Path, bool]]:
    """Yield the files below a directory by relative name, and whether each is left out; whole directories may be left out."""
    if directory is None:
        return
    hidden = None if apart is None else apart.resolve()

    def walk(at: Path, above: frozenset[Path]) -> Iterator[tuple[str, Path, bool]]:
        for path in sorted(at.iterdir()):
            name = str(path.relative_to(directory))
            real = Path(os.path.realpath(path))  # of a loop of links too
            # Following a link to a parent directory would never end.
            if real == hidden or real in above:
                continue
            if path.is_dir():
                if _SKIPPED_DIRECTORIES.match(path.name):
                    yield name, path, True
                else:
                    yield from walk(path, above | {real})
            elif path.is_file() and not _OWN.match(path.name):
                # Below the top, weights belong to separate modules (such as sentence-transformers' 2_Dense).
                yield name, path, at == directory and bool(_STALE.search(path.name))

    yield from walk(directory, frozenset({directory.resolve()}))


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
_VARIANT_WORDS = {"base", "chat", "instruct", "it", "thinking", "reasoning"}
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


def base_source(
    path: Path, config: ModelConfig, stated: object, identity: Mapping[str, Any]
) -> BaseSource:
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
    # JSON cannot hold bytes that are not UTF-8.
    name = os.fsencode(path.resolve().name).decode(errors="backslashreplace")
    source: dict[str, Any] = {"name": name}
    if cached := cached_model(path):
        cached_id, revision = cached
        source = {
            "name": cached_id.rpartition("/")[2],
            "model_id": cached_id,
            "revision": revision,
        }
    elif manifest := read_manifest(path if path.is_dir() else path.parent):
        source["address"] = manifest.address
    if model_id is not None:
        source.setdefault("model_id", model_id)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return {**source, "digest": digest[:DIGEST_CHARACTERS], **identity}


def in_short(source: NameSource) -> dict[str, str]:
    """Return a source's name, id, revision and digest, without its identity."""
    return {
        key: str(source[key]) for key in ("name", "model_id", "revision", "digest") if key in source
    }


def hub_id(stated: object, path: Path) -> str | None:
    """Return a config's name for a model if it can be taken as the hub id, ``owner/name``, of the model at `path`; else None.

    A relative path of two parts looks like an id. It is taken as an id if it ends in the model's name, but not if it is the path of this
    model or starts with a usual name for a directory of models. Whether other paths exist does not matter, so the same inputs get the same
    names wherever a run starts.
    """
    if not isinstance(stated, str) or not HUB_ID.fullmatch(stated):
        return None
    owner, _, name = stated.partition("/")
    real = path.resolve()
    is_path = owner == real.parent.name or owner.lower() in DIRECTORIES
    return None if is_path or name != real.name else stated


def cached_model(path: Path) -> tuple[str, str] | None:
    """Return the id and revision of a model in the hub's cache, ``models--OWNER--NAME/snapshots/REVISION``; else None."""
    match = re.search(r"/models--([^/]+)/snapshots/([^/]+)", str(path.resolve()))
    return (match[1].replace("--", "/"), match[2]) if match else None


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
    is_telling = "/" in trained_on or _sizes(_words(trained_on))
    if (
        not is_telling
        or not telling
        or any(_may_be_same(_words(trained_on), _words(name)) for name in others)
    ):
        return []
    differs = f"names {trained_on!r} as its base, but the base given here is {telling[0]!r}"
    return [f"the adapter's config {differs}; check that the adapter was trained on this model"]


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
    if a & _VARIANT_WORDS != b & _VARIANT_WORDS or (
        _sizes(a) and _sizes(b) and _sizes(a) != _sizes(b)
    ):
        return False
    a = a - _sizes(a)
    b = b - _sizes(b)
    return a <= b or b <= a


VOCABULARIES = {
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "spm_char.model",
    "source.spm",
    "entity_vocab.json",
    "vocab-src.json",
    "bpe.codes",
    "dict.txt",
    "prophetnet.tokenizer",
    "byte_maps.json",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.tiktoken",
    "qwen.tiktoken",
}
"""Files in which transformers' tokenizers store their vocabularies: a tokenizer without any of them is incomplete."""

TOKENIZER_CONFIG = "tokenizer_config.json"

ADDED_TOKENS = "added_tokens.json"

TOKENIZER = VOCABULARIES | {
    TOKENIZER_CONFIG,
    ADDED_TOKENS,
    "special_tokens_map.json",
    "merges.txt",
    "normalizer.json",
    "target.spm",
    "target_vocab.json",
    "vocab-tgt.json",
    "emoji.json",
    "word_shape.json",
    "word_pronunciation.json",
    "chat_template.jinja",
    "chat_template.json",
}
"""Files that form a tokenizer and its chat template, together with `TEMPLATES`; files of one tokenizer must not join another's."""

TEMPLATES = "additional_chat_templates"

PROCESSOR = {
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
}
"""Files of a processor for images or sound. If a trainer saves only the tokenizer, the base's processor is kept."""

MOST_BYTES = 200_000_000
"""Largest vocabulary file that is searched; larger files are accepted unchecked."""

_ADDED = re.compile(rb'"id"\s*:\s*(\d+)')
_VOCAB = re.compile(rb'"vocab"\s*:\s*([{\[])')
_TOKEN = re.compile(rb'\s*"(?:[^"\\]|\\.)*+"\s*:\s*(?P<number>\d+)\s*(?P<separator>[,}])')
_PIECE = re.compile(rb'\s*\[\s*"(?:[^"\\]|\\.)*+"\s*,\s*[-+\d.eE]+\s*\]\s*(?P<separator>[,\]])')


class TokenizerChoice(NamedTuple):
    """The files that a merged model takes along, and whose tokenizer they include.

    If parts of an adapter's tokenizer were not used, the reason is a warning if that tokenizer may have tokens that the other one lacks,
    else a note.
    """

    copies: Copies
    tokenizer: Literal["adapter", "base"] | None
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()


def with_tokenizer(
    copies: Copies, adapter: DeltaSource, base: Path | None, config: ModelConfig, grown: int | None
) -> TokenizerChoice:
    """Replace the base's tokenizer by the adapter's among the files that a merged model takes along.

    Parameters
    ----------
    base, config
        The base's directory and config.
    grown
        The vocabulary's new size, if the adapter changes it.
    """
    has_one = any(_is_tokenizer(name) for name, _ in copies)
    stays: Literal["adapter", "base"] | None = "base" if has_one else None
    beside = adapter.path
    if adapter.describes_model:
        return TokenizerChoice(copies, "adapter" if has_one else None)
    if config.pipeline:
        return TokenizerChoice(copies, None)
    if base is not None and base.resolve() == beside.resolve():
        return TokenizerChoice(copies, stays)
    others = other_files(beside)
    of_adapter = [copy for copy in others if _is_tokenizer(copy[0])]
    if not of_adapter:
        says = f"the vocabulary has grown to {grown} rows, but the adapter has no tokenizer: the base's is kept"
        return TokenizerChoice(copies, stays, notes=[says] if grown is not None and has_one else [])
    has = {name for name, _ in of_adapter}
    if why := _unusable(has, beside, grown or config.vocab_size):
        kept = "the tokenizer is the base's" if has_one else "none is taken along"
        says = f"the adapter's tokenizer is not used, because {why}: {kept}"
        if has.isdisjoint(VOCABULARIES | {ADDED_TOKENS}):
            return TokenizerChoice(copies, stays, notes=[says])
        warning = f"{says}, and the merged model does not know tokens that were added for training"
        return TokenizerChoice(copies, stays, warnings=[warning])
    processor = [copy for copy in others if copy[0] in PROCESSOR]
    rest = [copy for copy in copies if not _is_tokenizer(copy[0])]
    if processor:
        rest = [copy for copy in rest if copy[0] not in PROCESSOR]
    return TokenizerChoice(sorted([*rest, *of_adapter, *processor]), "adapter")


def _unusable(names: Collection[str], directory: Path, rows: int | None) -> str:
    """Say why a tokenizer of these files does not fit an embedding with so many rows; empty if it does."""
    if VOCABULARIES.isdisjoint(names):
        return "a vocabulary is missing"
    if TOKENIZER_CONFIG not in names:
        return f"{TOKENIZER_CONFIG} is missing"
    tokens = token_count(directory)
    if tokens is not None and rows is not None and tokens > rows:
        return f"it has {tokens} tokens, but the merged embedding {rows} rows"
    return ""


def _is_tokenizer(name: str) -> bool:
    return name in TOKENIZER or Path(name).parts[0] == TEMPLATES


def token_count(directory: Path) -> int | None:
    """Count tokens as one more than the largest number in ``tokenizer.json``; None if the file is missing or not as expected."""
    path = directory / "tokenizer.json"
    if not path.is_file() or not 0 < path.stat().st_size <= MOST_BYTES:
        return None
    # Scan the mapped file token by token: parsed as objects, a vocabulary would take hundreds of megabytes.
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = _VOCAB.search(data)
        if start is None:
            return None
        by_number = start[1] == b"{"
        entry = _TOKEN if by_number else _PIECE
        at = start.end()
        count = 0
        separator = b","
        while separator == b",":
            match = entry.match(data, at)
            if match is None:
                return None
            at = match.end()
            separator = match["separator"]
            count = max(count, int(match["number"]) + 1) if by_number else count + 1
        added = (int(m[1]) + 1 for m in _ADDED.finditer(data, 0, start.start()))
        return max([count, *added])

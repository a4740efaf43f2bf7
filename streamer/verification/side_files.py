"""Compare the files beside the weights with the files of the input from which each must come; report missing and additional files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePath
from typing import Any

from streamer.verification.directory import INDEX_NAME, LOADED, READ, TEMPLATES
from streamer.verification.formulas import CONFIG_NAME, AdapterFiles
from streamer.verification.record import shards
from streamer.verification.result import Outcome

MODEL_CONFIG = "config.json"
APART = {"model": {"README.md", INDEX_NAME, MODEL_CONFIG}, "adapter": {"README.md", CONFIG_NAME}}
"""Files of each kind of output that are checked elsewhere, and the model card, which anyone may edit."""

OF_QUANTIZED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files that a model no longer needs once its weights are plain."""

VOCABULARIES = {
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model",
    "spm.model", "spm_char.model", "source.spm", "entity_vocab.json", "vocab-src.json", "bpe.codes", "dict.txt", "prophetnet.tokenizer",
    "byte_maps.json", "tekken.json", "tiktoken.model", "tokenizer.tiktoken", "qwen.tiktoken",
}  # fmt: skip
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = VOCABULARIES | {
    TOKENIZER_CONFIG, "added_tokens.json", "special_tokens_map.json", "merges.txt", "normalizer.json", "target.spm", "target_vocab.json",
    "vocab-tgt.json", "emoji.json", "word_shape.json", "word_pronunciation.json", "chat_template.jinja", "chat_template.json",
}  # fmt: skip
PROCESSOR = {
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json",
}  # fmt: skip
"""Files of transformers' tokenizers and processors; a merged model takes them from one input."""

MODULES = re.compile(r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json|\d+_\w+/.*")
"""The modules that sentence-transformers runs after a transformer: the adapter's, if it has a list of them."""

ASKED = {
    "generation_config.json", "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
}  # fmt: skip
"""Files requested from every https server. Such servers list no files, so other files may be missing on one side."""


def check_side_files(record: dict[str, Any], base_path: Path, adapter: AdapterFiles, outcome: Outcome) -> None:
    """Compare every copied file byte by byte, and report files that a loader reads but only one side has."""
    listed = {entry["file"] for entry in record["files"]} - APART[outcome.kind] - {*shards(record)}
    folders = {".", TEMPLATES, *(str(PurePath(name).parent) for name in listed)}
    wanted, tokenizer = _wanted(record, base_path, adapter, folders, outcome)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamer"
    remote = any(str(record[key].get("address")).startswith("http") for key in ("base", "adapter"))
    inputs = base_path, adapter.directory
    partly = remote or any(path.is_file() or cache.resolve() in path.resolve().parents for path in inputs)
    if outcome.kind == "model" and record["tokenizer"] != tokenizer and not partly:
        expected = f"the tokenizer of {tokenizer or 'neither input'}"
        outcome.misrecorded(expected, f"that of {record['tokenizer'] or 'neither'}")
    for name in sorted(listed | wanted.keys()):
        path = outcome.output / name
        if name in listed and name in wanted:
            if wanted[name].read_bytes() != path.read_bytes():
                outcome.differ(path, f"the bytes of {wanted[name]}", "others")
        elif (name in listed and _is_like(name, LOADED)) or (name in ASKED if partly else _is_like(name, READ)):
            expected = f"a copy of {wanted[name]}" if name in wanted else "no such file, as the inputs have none for it"
            outcome.differ(path, expected, "none" if name in wanted else "one")
        elif name in listed:
            outcome.not_compared.append({"tensor": name, "reason": "a file that neither input has"})


def _wanted(
    record: dict[str, Any], base_path: Path, adapter: AdapterFiles, folders: set[str], outcome: Outcome
) -> tuple[dict[str, Path], str | None]:
    """Find the files that an output copies, by relative name, and the input whose tokenizer they include."""
    if outcome.kind == "adapter":
        return {} if adapter.is_model else _files(adapter.directory, folders, APART["adapter"]), None
    apart = APART["model"] | {CONFIG_NAME, *(OF_QUANTIZED if record["dequantize"] else ())}
    found = _files(adapter.directory if adapter.is_model else base_path, folders, apart)
    stays = any(map(_is_tokenizer, found))
    if adapter.is_model:
        return found, "adapter" if stays else None
    modules = _modules(adapter.directory)
    if modules and all(folder.is_dir() for folder in modules):
        theirs = _files(adapter.directory, folders, apart)
        found = {name: path for name, path in found.items() if not MODULES.fullmatch(name)}
        found |= {name: path for name, path in theirs.items() if MODULES.fullmatch(name)}
    same = base_path.resolve() == adapter.directory.resolve()
    brought = {} if same else _files(adapter.directory, {".", TEMPLATES}, apart)
    own = {name for name in brought if _is_tokenizer(name)}
    rows, tokens = _rows(outcome.output / MODEL_CONFIG), _token_count(adapter.directory / "tokenizer.json")
    fewer = tokens > rows if rows else record["tokenizer"] == "base"
    if TOKENIZER_CONFIG not in own or not own & VOCABULARIES or fewer:
        return found, "base" if stays else None
    taken = own | (brought.keys() & PROCESSOR)
    kept = {
        name: path
        for name, path in found.items()
        if not _is_tokenizer(name) and not (name in PROCESSOR and taken & PROCESSOR)
    }
    return kept | {name: brought[name] for name in taken}, "adapter"


def _files(directory: Path, folders: set[str], apart: set[str]) -> dict[str, Path]:
    inside = (directory / folder for folder in folders if (directory / folder).is_dir())
    found = {str(path.relative_to(directory)): path for folder in inside for path in folder.iterdir() if path.is_file()}
    return {name: path for name, path in found.items() if name not in apart}


def _modules(adapter: Path) -> list[Path]:
    """List the folders that an adapter's ``modules.json`` names."""
    try:
        tree = json.loads((adapter / "modules.json").read_bytes())
        return [adapter / module["path"] for module in tree if not module["type"].endswith("Normalize")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _is_tokenizer(name: str) -> bool:
    return name in TOKENIZER or name.startswith(f"{TEMPLATES}/")


def _is_like(name: str, patterns: tuple[str, ...]) -> bool:
    return any(PurePath(name).match(pattern) for pattern in patterns)


def _rows(path: Path) -> int:
    """Read the number of tokens that a config permits; 0 if it does not state it."""
    tree = json.loads(path.read_bytes()) if path.is_file() else {}
    stated = (part.get("vocab_size") for part in (tree, tree.get("text_config")) if isinstance(part, dict))
    return next((rows for rows in stated if type(rows) is int), 0)


def _token_count(path: Path) -> int:
    """Return the largest token number of a ``tokenizer.json`` plus one; 0 if it is unknown."""
    try:
        tree = json.loads(path.read_bytes())
        vocab, added = tree["model"]["vocab"], tree.get("added_tokens") or ()
        numbers = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return 1 + max([*numbers, *(int(token["id"]) for token in added)], default=-1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0

"""Choose a merged model's tokenizer: the adapter's if a complete one is beside its weights, else the base's; never a mixture.

Trainers save their tokenizer beside the adapter: it may have more tokens, another padding token or another chat template.
"""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Literal

from streamer.plan.plan import Plan
from streamer.plan.side_files import other_files

VOCABULARIES = {
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model",
    "spm.model", "spm_char.model", "source.spm", "entity_vocab.json", "vocab-src.json", "bpe.codes", "dict.txt", "prophetnet.tokenizer",
    "byte_maps.json", "tekken.json",
    "tiktoken.model", "tokenizer.tiktoken", "qwen.tiktoken",
}  # fmt: skip
"""Files in which transformers' tokenizers store their vocabularies: a tokenizer without any of them is incomplete."""

TOKENIZER_CONFIG = "tokenizer_config.json"

ADDED_TOKENS = "added_tokens.json"

TOKENIZER = VOCABULARIES | {
    TOKENIZER_CONFIG, ADDED_TOKENS, "special_tokens_map.json", "merges.txt", "normalizer.json", "target.spm", "target_vocab.json",
    "vocab-tgt.json", "emoji.json", "word_shape.json", "word_pronunciation.json", "chat_template.jinja", "chat_template.json",
}  # fmt: skip
"""Files that form a tokenizer and its chat template, together with `TEMPLATES`; files of one tokenizer must not join another's."""

TEMPLATES = "additional_chat_templates"

PROCESSOR = {
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json",
}  # fmt: skip
"""Files of a processor for images or sound. If a trainer saves only the tokenizer, the base's processor is kept."""

MOST_BYTES = 200_000_000
"""Largest vocabulary file that is searched; larger files are accepted unchecked."""

Copies = list[tuple[str, Path]]

_ADDED = re.compile(rb'"id"\s*:\s*(\d+)')
_VOCAB = re.compile(rb'"vocab"\s*:\s*([{\[])')
_TOKEN = re.compile(rb'\s*"(?:[^"\\]|\\.)*+"\s*:\s*(\d+)\s*([,}])')
_PIECE = re.compile(rb'\s*\[\s*"(?:[^"\\]|\\.)*+"\s*,\s*[-+\d.eE]+\s*\]\s*([,\]])')


def with_tokenizer(
    plan: Plan, copies: Copies
) -> tuple[Copies, Literal["adapter", "base"] | None, list[str], list[str]]:
    """Replace the base's tokenizer by the adapter's among the files that a merged model takes along.

    Returns
    -------
    copies, tokenizer, warnings, notes
        The files; whose tokenizer they include; and, if parts of an adapter's tokenizer were not used, the reason: a warning if that
        tokenizer may have tokens that the other one lacks.
    """
    stays: Literal["adapter", "base"] | None = "base" if any(_is_tokenizer(name) for name, _ in copies) else None
    beside, base = plan.adapter.path, plan.base.directory
    if plan.adapter.describes_model:
        return copies, "adapter" if stays else None, [], []
    if plan.config.pipeline:
        return copies, None, [], []
    if base is not None and base.resolve() == beside.resolve():
        return copies, stays, [], []
    own = [c for c in other_files(beside) if _is_tokenizer(c[0])]
    if not own:
        rows = plan.edits.vocabulary
        grown = f"the vocabulary has grown to {rows} rows, but the adapter has no tokenizer: the base's is kept"
        return copies, stays, [], [grown] if rows is not None and stays else []
    has = {name for name, _ in own}
    tokens, rows = token_count(beside), plan.edits.vocabulary or plan.config.vocab_size
    lacks = "a vocabulary" if not has & VOCABULARIES else "" if TOKENIZER_CONFIG in has else TOKENIZER_CONFIG
    why = f"{lacks} is missing" if lacks else ""
    if not lacks and tokens is not None and rows is not None and tokens > rows:
        why = f"it has {tokens} tokens, but the merged embedding {rows} rows"
    if why:
        kept = "the tokenizer is the base's" if stays else "none is taken along"
        says = f"the adapter's tokenizer is not used, because {why}: {kept}"
        if has.isdisjoint(VOCABULARIES | {ADDED_TOKENS}):
            return copies, stays, [], [says]
        return copies, stays, [f"{says}, and the merged model does not know tokens that were added for training"], []
    processor = [c for c in other_files(beside) if c[0] in PROCESSOR]
    drop = PROCESSOR if processor else set[str]()
    rest = [c for c in copies if not _is_tokenizer(c[0]) and c[0] not in drop]
    return sorted([*rest, *own, *processor]), "adapter", [], []


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
        entry, at, count = _TOKEN if by_number else _PIECE, start.end(), 0
        while found := entry.match(data, at):
            at = found.end()
            count = max(count, int(found[1]) + 1) if by_number else count + 1
            if found[found.re.groups] != b",":
                break
        else:
            return None
        added = (int(m[1]) + 1 for m in _ADDED.finditer(data, 0, start.start()))
        return max([count, *added])

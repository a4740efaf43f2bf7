"""Texts, and tokenizers of each kind that read them."""

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from seeds import vary
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from streamer.measuring.sequences import TextSequences
from streamer.measuring.texts import read_text

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards pack boxes of liquor jugs; straße, naïve, 東京 🦊"

WORDS = TEXT.split()

CHATML = """{{ '<s>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}\
{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

DATED = """{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}\
{% endif %}{{ '<s>' + date_string }}""" + CHATML.replace("{{ '<s>' }}", "")
"""As Llama 3.2's."""

FORGETFUL = """{% for m in messages %}{{ '[' + m['role'] + ']' }}{{ m['content'] if m['role'] != 'assistant' or loop.last else '…' }}\
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
"""As templates that leave out the reasoning of earlier answers."""


def prose(count: int, seed: int = 0) -> str:
    rng = random.Random(vary(seed))
    return "".join(
        rng.choice(WORDS) + rng.choice([" ", " ", " ", "\n", "  ", ", "]) for _ in range(count)
    )


def save(
    directory: Path, kind: str = "bytes", template: str | None = None, start: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer as GPT-2's and Llama 3's (bytes), as Llama 2's (pieces), or of words that stand alone."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[UNK]"]
    made = tokenizers.Tokenizer(
        models.WordLevel(unk_token="[UNK]") if kind == "words" else models.BPE()
    )
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "pieces":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    else:
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    made.train_from_iterator([prose(2000)], trainer)
    if start:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    return fast


def lines(path: Path, *objects: Any) -> Path:
    path.write_text(
        "".join(
            f"{x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)}\n" for x in objects
        )
    )
    return path


def read(path: Path, **options: Any) -> TextSequences:
    return read_text(path, path.parent, **options)

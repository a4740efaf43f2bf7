"""The tokenizer of a merged model is the adapter's as a whole, or the base's as a whole; the tokenizers library is the oracle."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from forks import server
from helpers import three_shards
from safetensors.torch import load_file, save_file
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import streamer
from streamer.plan.side_files import TOKENIZER, token_count

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"]


def tokenizer(kind: str, size: int = 60) -> tokenizers.Tokenizer:
    model, trainer = {
        "bpe": (models.BPE(), trainers.BpeTrainer(vocab_size=size, show_progress=False)),
        "wordpiece": (
            models.WordPiece(unk_token="[UNK]"),
            trainers.WordPieceTrainer(
                vocab_size=size, show_progress=False, special_tokens=["[UNK]", '"vocab": {']
            ),
        ),
        "unigram": (
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=size, show_progress=False),
        ),
    }[kind]
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(TEXT, trainer)
    return made


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_tokens_are_counted_as_the_library_counts_them(kind: str, tmp_path: Path) -> None:
    made = tokenizer(kind)
    for more in ([], ["<one>", "<two>"]):
        made.add_special_tokens(more)
        for pretty in (True, False):
            made.save(str(tmp_path / "tokenizer.json"), pretty=pretty)
            assert token_count(tmp_path) == made.get_vocab_size()


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, Path]:
    base, adapter = three_shards(tmp_path)
    (base / "config.json").write_text(
        json.dumps({"model_type": "test", "vocab_size": 64, "tie_word_embeddings": False})
    )
    (base / "tokenizer.json").unlink()
    save(base, "wordpiece", "base's template")
    (base / "vocab.txt").write_text("only the base's")
    (base / "preprocessor_config.json").write_text("{}")
    return base, adapter


def save(directory: Path, kind: str, template: str, *more: str) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(kind))
    fast.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": list(more)})
    fast.chat_template = template
    fast.save_pretrained(directory)


def merge(base: Path, adapter: Path, out: Path) -> dict:
    return streamer.merge_with_reduced_intruder_dimensions(base, adapter, out, mitigation_lambda=1)


def test_the_adapters_tokenizer_replaces_the_bases_as_a_whole(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = job
    assert merge(base, adapter, tmp_path / "before")["tokenizer"] == "base"
    save(adapter, "bpe", "adapter's template", "<call>")
    (adapter / "training_args.json").write_text("{}")
    record = merge(base, adapter, tmp_path / "out")
    assert record["tokenizer"] == "adapter"
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (adapter / name).read_bytes()
    assert not (out / "vocab.txt").exists()  # would be the base's beside it
    assert not (out / "training_args.json").exists()
    assert (out / "preprocessor_config.json").exists()
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.chat_template == "adapter's template"
    assert "<call>" in loaded.get_vocab()


def test_a_note_says_why_the_adapters_tokenizer_is_not_used(
    job: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = job
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    record = merge(base, adapter, tmp_path / "template")
    assert record["tokenizer"] == "base"
    assert record["notes"] == [
        "the adapter's tokenizer is not used, because a vocabulary is missing: the tokenizer is the base's"
    ]
    assert (tmp_path / "template" / "chat_template.jinja").read_text() == "base's template"
    save(adapter, "bpe", "adapter's", *(f"<{i}>" for i in range(20)))
    with pytest.warns(streamer.StreamerWarning, match="tokens, but the merged embedding 64 rows"):
        record = merge(base, adapter, tmp_path / "larger")
    assert record["tokenizer"] == "base"
    (line,) = record["warnings"]
    assert "tokens, but the merged embedding 64 rows: the tokenizer is the base's" in line
    assert line in (tmp_path / "larger" / "README.md").read_text()
    assert record["notes"] == []
    assert (tmp_path / "larger" / "vocab.txt").exists()


@pytest.mark.parametrize("gone", ["tokenizer_config.json", "tokenizer.json"])
def test_tokens_that_are_lost_are_a_warning(
    gone: str, job: tuple[Path, Path], tmp_path: Path
) -> None:
    """Half a tokenizer that may have tokens of its own, as against a chat template."""
    base, adapter = job
    save(adapter, "bpe", "adapter's", "<call>")
    (adapter / "added_tokens.json").write_text('{"<call>": 61}')
    (adapter / gone).unlink()
    done = server().run("merge", base, adapter, "-o", tmp_path / "out", "--lambda", 1, "--quiet")
    assert done.code == 0
    (line,) = json.loads((tmp_path / "out" / "streamer.json").read_text())["warnings"]
    assert line.endswith(
        "the tokenizer is the base's, and the merged model does not know tokens that were added for training"
    )
    assert len(line) <= 300
    assert f"streamer: warning: {line}" in done.err


def test_a_mitigated_adapter_keeps_its_own(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    assert streamer.reduce_intruder_dimension(base, adapter, tmp_path / "none")["tokenizer"] is None
    save(adapter, "bpe", "adapter's")
    assert (
        streamer.reduce_intruder_dimension(base, adapter, tmp_path / "own")["tokenizer"]
        == "adapter"
    )


def test_a_grown_vocabulary_and_its_tokenizer(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = job
    name = "model.embed_tokens.weight"
    rows = 64
    shard = base / "model-00001-of-00003.safetensors"
    index = base / "model.safetensors.index.json"
    save_file({**load_file(shard), name: torch.zeros(rows, 48)}, shard)
    tree = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**tree["weight_map"], name: shard.name}}))
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{name}": torch.ones(rows + 8, 48)}, file)
    with pytest.warns(streamer.StreamerWarning, match="total_size"):
        record = merge(base, adapter, tmp_path / "none")
    assert record["tokenizer"] == "base"
    assert record["notes"] == [
        f"the vocabulary has grown to {rows + 8} rows, but the adapter has no tokenizer: the base's is kept"
    ]
    save(adapter, "bpe", "adapter's", *(f"<{i}>" for i in range(6)))
    with pytest.warns(streamer.StreamerWarning, match="total_size"):
        record = merge(base, adapter, tmp_path / "own")
    assert (record["tokenizer"], record["notes"]) == ("adapter", [])


def test_every_vocabulary_of_transformers_is_known() -> None:
    folder = Path(transformers.__file__).parent / "models"
    stated = re.compile(
        r'"(?:\w*vocab|spm|merges|emoji|word_\w+|normalizer|tokenizer)_file": ?"([^"]+)"'
    )
    names = {
        name
        for path in folder.rglob("tokenization*.py")
        for name in stated.findall(path.read_text())
    }
    assert len(names) > 15
    assert names <= TOKENIZER

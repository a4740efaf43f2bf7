"""Texts become the tokens that transformers makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from helpers import three_shards
from safetensors.torch import load_file, save_file
from tokenized_texts import CHATML, lines, prose, read, save
from transformers import AutoTokenizer

import streamer
from streamer.errors import FormatError, MissingInputError, StorageError, UnsupportedError, UsageError
from streamer.measuring.tokenizer import load_tokenizer, tokenizer_directory
from streamer.plan.plan import make_plan
from streamer.streaming.extra import unreadable


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_sequences_of_a_long_text_lie_at_even_distances(kind: str, start: bool, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, kind, start=start)
    text = prose(20_000)
    (tmp_path / "t.txt").write_text(text)
    found = read(tmp_path / "t.txt", sequences=8, length=32)
    assert len(found.ids) == 8
    raw, at = text.encode(), 0

    def tokens(place: int) -> list[int]:
        return tokenizer(raw[place : place + 2000].decode(errors="ignore"), add_special_tokens=False).input_ids

    for i, ids in enumerate(found.ids):
        assert len(ids) == 32
        assert found.counted[i].tolist() == [False, *[True] * 31]
        begin = tokenizer.bos_token_id
        assert (ids[0] == begin, begin in ids[1:]) == (start, False)
        # what transformers makes of the text from some word on, near the even place
        even = i * len(raw) // 8
        place = next(
            p
            for p in range(max(even, at), even + 110)
            if raw[p] & 0xC0 != 0x80  # no character is cut
            and (tokens(p)[:31] == ids[1:].tolist() or (not start and tokens(p)[:32] == ids.tolist()))
        )
        assert place == 0 or raw[place - 1 : place].isspace() or raw[place : place + 1].isspace()
        at = place + 1


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_short_text_is_taken_whole_and_once(kind: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, kind)
    text = prose(300)
    (tmp_path / "t.txt").write_text(text)
    found = read(tmp_path / "t.txt", sequences=1000, length=20)
    total = len(tokenizer(text, add_special_tokens=False).input_ids)
    assert total // 19 - 3 <= len(found.ids) <= total // 19
    back = "".join("".join(tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False).split()) for ids in found.ids)
    assert "".join(text.split()).startswith(back)
    assert len(back) > 0.9 * len("".join(text.split()))


def test_more_text_is_read_where_a_token_stands_for_much_of_it(tmp_path: Path) -> None:
    save(tmp_path, "words", start=False)
    (tmp_path / "t.txt").write_text(("the" + " " * 200) * 100 + "fox " * 3)
    assert [len(ids) for ids in read(tmp_path / "t.txt", sequences=2, length=40).ids] == [40, 40]


def test_text_without_spaces_begins_at_a_character(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "t.txt").write_text("東京🦊" * 4000)
    found = read(tmp_path / "t.txt", sequences=7, length=16)
    assert len(found.ids) == 7


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "expected 2 sequences of 16 tokens at least, found 0 tokens; give more text"),
        (b"the quick brown fox jumps over a lazy dog", "found 9 tokens; give more text, or --length 4"),
        (b"the quick \xff brown fox", "expected text in UTF-8, found another byte at 10; convert it"),
        (b"the quick brown \xe6\x9d", "expected text in UTF-8, found another byte at 16; convert it"),
    ],
)
def test_texts_that_are_refused(raw: bytes, words: str, tmp_path: Path) -> None:
    save(tmp_path, "words", start=False)
    (tmp_path / "t.txt").write_bytes(raw)
    with pytest.raises(FormatError) as e:
        read(tmp_path / "t.txt", length=16)
    assert str(e.value).endswith(words)


@pytest.mark.parametrize("least", [2, 4])
def test_the_length_that_is_named_does(least: int, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(prose(25))
    save(tmp_path)
    with pytest.raises(FormatError, match=f"expected {least} sequences of") as refused:
        read(path, length=64, least=least)
    length = int(str(refused.value).split()[-1])
    assert len(read(path, length=length, least=least).ids) >= least


def test_the_models_vocabulary_may_be_smaller(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "t.txt").write_text(prose(500))
    with pytest.raises(
        FormatError,
        match=r"expected token ids from 0 to 99, found .* in sequence 1; it was made with another tokenizer",
    ):
        read(tmp_path / "t.txt", length=16, vocabulary=100)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here whose first byte cannot be read")
@pytest.mark.parametrize("name", ["t.npy", "t.txt", "t.jsonl"])
def test_a_text_on_a_disk_that_fails(name: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(StorageError, match=rf"{name}: cannot read: Input/output error"):
        read(tmp_path / name, length=16)
    (tmp_path / name).unlink()
    with pytest.raises(MissingInputError, match="no such file"):
        read(tmp_path / name, length=16)


# Tokenizers ----------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(FormatError, match="transformers cannot read its tokenizer: "):
        load_tokenizer(tmp_path / "t.txt", tmp_path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here whose first byte cannot be read")
def test_a_tokenizer_on_a_disk_that_fails(tmp_path: Path) -> None:
    """transformers reads it, and then the tokenizers library, whose `Exception` states the system's error in words."""
    file = tmp_path / "tokenizer.json"
    file.symlink_to("/proc/self/mem")
    with pytest.raises(StorageError, match="cannot read: Input/output error"):
        load_tokenizer(tmp_path / "t.txt", tmp_path)
    with pytest.raises(Exception, match="os error") as raised:
        tokenizers.Tokenizer.from_file(str(file))
    assert isinstance(unreadable(file, "transformers cannot read it", raised.value), StorageError)


def test_a_tokenizer_without_offsets(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(
        UnsupportedError,
        match=r"its tokenizer \(CanineTokenizer\) does not report positions in the text",
    ):
        load_tokenizer(tmp_path / "t.txt", tmp_path)


def test_all_tokens_that_a_tokenizer_puts_first_stand_first_and_do_not_count(tmp_path: Path) -> None:
    """As GLM's, `[gMASK]<sop>`, of which none is the token that begins a text by name."""
    save(tmp_path, "words")
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": t, "type_id": 0}} for t in ("<|im_start|>", "<s>")]
    single += [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    names = {x["content"]: x["id"] for x in tree["added_tokens"]}
    tree["post_processor"]["single"] = single
    tree["post_processor"]["special_tokens"] = {
        t: {"id": t, "ids": [names[t]], "tokens": [t]} for t in ("<|im_start|>", "<s>", "</s>")
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("bos_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    start = [names["<|im_start|>"], names["<s>"]]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.bos_token is None
    made = tokenizer("the quick fox").input_ids
    assert (made[:2], made[-1]) == (start, names["</s>"])
    line = {"prompt": "the", "completion": " quick fox"}
    for name, objects in (("d", [{"text": "the quick fox"}] * 2), ("p", [line, line])):
        found = read(lines(tmp_path / f"{name}.jsonl", *objects))
        assert found.ids[0].tolist() == made[:-1]
        assert found.counted[0].tolist() == [False, False, name == "d", True, True]
    (tmp_path / "t.txt").write_text(prose(300))
    found = read(tmp_path / "t.txt", sequences=3, length=8)
    assert [ids[:2].tolist() for ids in found.ids] == [start] * 3
    assert [counted.tolist() for counted in found.counted] == [[False, False, *[True] * 6]] * 3
    with pytest.raises(UsageError, match="--length: expected more than the 2 tokens that the tokenizer puts before"):
        read(tmp_path / "t.txt", length=2)


def test_the_choice_is_the_same_in_every_run(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "t.txt").write_text(prose(3000))
    first, second = (read(tmp_path / "t.txt", sequences=9, length=16) for _ in range(2))
    assert first.digest() == second.digest()
    assert all(np.array_equal(a, b) for a, b in zip(first.ids, second.ids, strict=True))


def test_whose_tokenizer(tmp_path: Path) -> None:
    """The adapter's where a merged model would have it: its chat template is what it was trained with."""
    base, adapter = three_shards(tmp_path)
    save(base)
    assert tokenizer_directory(make_plan(base, adapter)) == base
    save(adapter, template=CHATML)
    assert (
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", mitigation_lambda=1)[
            "tokenizer"
        ]
        == "adapter"
    )
    assert tokenizer_directory(make_plan(base, adapter)) == adapter
    (adapter / "tokenizer.json").unlink()
    assert tokenizer_directory(make_plan(base, adapter)) == base
    tuned = shutil.copytree(base, tmp_path / "tuned")
    weights = tuned / "model-00001-of-00003.safetensors"
    save_file({k: 2 * v for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert tokenizer_directory(make_plan(base, tuned)) == tuned

"""Texts become the tokens that transformers makes of them; of answers, those that its own masks say."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from helpers import three_shards
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import streamer
from streamer.errors import FormatError, UnsupportedError, UsageError
from streamer.evaluation.sequences import TextSequences
from streamer.evaluation.texts import read_text
from streamer.evaluation.tokenizer import load_tokenizer, tokenizer_directory
from streamer.plan.plan import make_plan

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
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice([" ", " ", " ", "\n", "  ", ", "]) for _ in range(count))


def save(
    directory: Path, kind: str = "bytes", template: str | None = None, start: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer as GPT-2's and Llama 3's (bytes), as Llama 2's (pieces), or of words that stand alone."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[UNK]"]
    made = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]") if kind == "words" else models.BPE())
    if kind == "bytes":
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "pieces":
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    else:
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    made.train_from_iterator([prose(2000)], trainer)
    if start:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")
    fast.chat_template = template
    fast.save_pretrained(directory)
    return fast


def lines(path: Path, *objects: Any) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)}\n" for x in objects))
    return path


def read(path: Path, **options: Any) -> TextSequences:
    return read_text(path, path.parent, **options)


# .txt ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_sequences_of_a_long_text_lie_at_even_distances(kind: str, start: bool, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, kind, start=start)
    text = prose(20_000)
    (tmp_path / "t.txt").write_text(text)
    found = read(tmp_path / "t.txt", sequences=8, length=32)
    assert len(found.ids) == 8
    raw, at = text.encode(), 0
    for i, ids in enumerate(found.ids):
        assert len(ids) == 32
        assert found.counted[i].tolist() == [False, *[True] * 31]
        begin = tokenizer.bos_token_id
        assert (ids[0] == begin, begin in ids[1:]) == (start, False)
        # what transformers makes of the text from some word on, near the even place
        even = i * len(raw) // 8
        place = next(
            p for p in range(max(even, at), even + 110)
            if tokenizer(raw[p : p + 2000].decode(errors="ignore"), add_special_tokens=False).input_ids[:31] == ids[1:].tolist()[:31]
            or (not start and tokenizer(raw[p : p + 2000].decode(errors="ignore"), add_special_tokens=False).input_ids[:32] == ids.tolist())
        )  # fmt: skip
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


def test_the_models_vocabulary_may_be_smaller(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "t.txt").write_text(prose(500))
    with pytest.raises(
        FormatError,
        match=r"expected token ids from 0 to 99, found .* in sequence 1; it was made with another tokenizer",
    ):
        read(tmp_path / "t.txt", length=16, vocabulary=100)


# .jsonl --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_documents(kind: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, kind)
    texts = [prose(20 + i, seed=i) for i in range(10)]
    found = read(lines(tmp_path / "t.jsonl", *({"text": t} for t in texts), ""), sequences=4, length=16)
    for i, ids, counted in zip((0, 2, 5, 7), found.ids, found.counted, strict=True):
        assert ids.tolist() == tokenizer(texts[i]).input_ids[:16]
        assert counted.tolist() == [False, *[True] * 15]


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("the quick brown", " fox jumps over"), ("東京 🦊 is", " straße\n"), ("", "the dog")]
)
def test_of_prompt_and_completion_the_completion_counts(
    kind: str, prompt: str, completion: str, tmp_path: Path
) -> None:
    tokenizer = save(tmp_path, kind)
    line = {"prompt": prompt, "completion": completion}
    found = read(lines(tmp_path / "t.jsonl", line, line))
    whole, before = tokenizer(prompt + completion).input_ids, tokenizer(prompt).input_ids
    assert whole[: len(before)] == before
    assert found.ids[0].tolist() == whole
    assert found.counted[0].tolist() == [i >= len(before) for i in range(len(whole))]


def test_a_token_of_both_sides_is_the_completions(tmp_path: Path) -> None:
    tokenizer = save(tmp_path)
    line = {"prompt": "the quick ", "completion": "brown fox"}
    found = read(lines(tmp_path / "t.jsonl", line, line))
    counted = found.ids[0][found.counted[0]]
    assert tokenizer.decode(counted) == " brown fox"


def test_the_start_is_not_written_twice(tmp_path: Path) -> None:
    tokenizer = save(tmp_path)
    line = {"prompt": "<s>the quick", "completion": " fox</s>"}
    found = read(lines(tmp_path / "t.jsonl", line, line))
    assert found.ids[0].tolist() == tokenizer("the quick fox</s>").input_ids
    assert found.ids[0][-1] == tokenizer.eos_token_id
    assert found.counted[0][-1]


def test_of_messages_the_answers_count_as_the_template_itself_marks_them(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, template=CHATML)
    talks = [
        [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}],
        [{"role": "system", "content": "a lazy dog"}, *({"role": r, "content": f"{r} {w}"} for w in ("the fox", "東京", "jugs")
                                                         for r in ("user", "assistant"))],
        [{"role": "user", "content": "boxes"}, {"role": "assistant", "content": "\n\nliquor\n"}, {"role": "user", "content": "dog"}],
    ]  # fmt: skip
    found = read(lines(tmp_path / "t.jsonl", *({"messages": m} for m in talks)))
    for messages, ids, counted in zip(talks, found.ids, found.counted, strict=True):
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids.tolist() == made["input_ids"]
        assert counted.tolist() == [bool(m) for m in made["assistant_masks"]]
        assert counted.any()


def test_an_answer_is_cut_at_the_end(tmp_path: Path) -> None:
    save(tmp_path, "words")
    line = {"prompt": "the quick", "completion": " brown fox jumps over"}
    found = read(lines(tmp_path / "t.jsonl", line, line), length=5)
    assert found.counted[0].tolist() == [False, False, False, True, True]


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "dog"}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "expected a JSON object, found another text: "),
        ('{"text": "a", "text": "b"}', "key 'text' appears twice"),
        ('"text"', "one kind alone, found a str"),
        ({"text": "a", "prompt": "b"}, "one kind alone, found the keys 'text', 'prompt'"),
        ({"prompt": "a"}, "found the keys 'prompt'"),
        ({"messages": MESSAGES, "prompt": "b"}, "found the keys 'messages', 'prompt'"),
        ({"source": "x"}, "found the keys 'source'"),
        ({}, "one kind alone, found the keys "),
        (
            {"messages": MESSAGES, "tools": [{}]},
            "has 'tools', which the chat template is not given; give 'prompt' and 'completion'",
        ),
        ({"text": 3}, "expected 'text' to be a string, found 3"),
        ({"prompt": "a", "completion": None}, "expected 'completion' to be a string, found None"),
        ({"text": ""}, "expected tokens to predict, found none that counts among its first 1"),
        ({"prompt": "the dog", "completion": ""}, "found none that counts among its first 3"),
        ({"prompt": "the " * 20, "completion": "dog"}, "among its first 16; it has 22 tokens: raise --length"),
        ({"messages": "a"}, "expected 'messages' to be a list of objects with 'role' and 'content'"),
        ({"messages": [{"content": "a"}]}, "expected 'messages' to be a list of objects with 'role' and 'content'"),
        ({"messages": MESSAGES[:1]}, "found none that counts"),
        ({"messages": []}, "the chat template refuses it: "),
        ({"messages": [{"role": "user"}]}, "the chat template refuses it: "),
    ],
)
def test_lines_that_are_refused(line: Any, words: str, tmp_path: Path) -> None:
    save(tmp_path, "words", template=CHATML)
    path = lines(tmp_path / "t.jsonl", {"text": "the fox"}, "", line)
    with pytest.raises(FormatError) as e:
        read(path, length=16)
    assert str(e.value).startswith(f"{path}: line 3: ")
    assert words in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("line", [{"text": "the dog"}, {"prompt": "the", "completion": " dog"}, {"messages": MESSAGES}])
def test_keys_that_say_nothing_of_the_text_are_ignored(line: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, "words", template=CHATML)
    plain = read(lines(tmp_path / "t.jsonl", line, line))
    more = {"id": 3, **line, "source": None, "tools": None}
    assert read(lines(tmp_path / "t.jsonl", more, more)).digest() == plain.digest()


def test_a_file_of_no_lines(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(FormatError, match=r"t\.jsonl: expected at least 2 sequences, .* found 0"):
        read(lines(tmp_path / "t.jsonl", "", ""))


def test_a_tokenizer_without_chat_template(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(
        FormatError,
        match=r"line 1: has 'messages', and the tokenizer in .* no chat template; give 'prompt' and 'completion'",
    ):
        read(lines(tmp_path / "t.jsonl", {"messages": MESSAGES}))


def test_a_template_that_writes_earlier_answers_otherwise(tmp_path: Path) -> None:
    save(tmp_path, template=FORGETFUL)
    both = [*MESSAGES, *MESSAGES]
    with pytest.raises(
        FormatError,
        match="so that answer 1 is not to be found; give a line for each answer, with the messages up to it",
    ):
        read(lines(tmp_path / "t.jsonl", {"messages": both}))
    assert read(lines(tmp_path / "t.jsonl", {"messages": MESSAGES}, {"messages": MESSAGES})).tokens > 0


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = save(tmp_path, template=DATED)
    path = lines(tmp_path / "t.jsonl", *[{"messages": MESSAGES}] * 2)
    expected = tokenizer.apply_chat_template(MESSAGES, date_string="26 Jul 2024")["input_ids"]
    assert read(path).ids[0].tolist() == expected


# Tokenizers ----------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(FormatError, match="transformers cannot read its tokenizer: "):
        load_tokenizer(tmp_path / "t.txt", tmp_path)


def test_a_tokenizer_without_offsets(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(
        UnsupportedError, match=r"its tokenizer \(CanineTokenizer\) does not tell where in the text its tokens stand"
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

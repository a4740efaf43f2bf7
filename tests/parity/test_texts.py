"""Texts and lines of JSON become the tokens that transformers makes of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from helpers import three_shards
from pairs import merge
from safetensors.torch import load_file, save_file
from tokenized_texts import CHATML, DATED, FORGETFUL, lines, prose, read, save
from transformers import AutoTokenizer

from streamer.errors import (
    FormatError,
    MissingInputError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from streamer.measuring.lines import MARK
from streamer.measuring.tokenizer import load_tokenizer, tokenizer_directory
from streamer.plan.plan import make_plan
from streamer.streaming.skeleton import unreadable


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_sequences_of_a_long_text_lie_at_even_distances(
    kind: str, start: bool, tmp_path: Path
) -> None:
    tokenizer = save(tmp_path, kind, start=start)
    text = prose(20_000)
    (tmp_path / "t.txt").write_text(text)
    found = read(tmp_path / "t.txt", sequences=8, length=32)
    assert len(found.ids) == 8
    raw = text.encode()
    at = 0

    def tokens(place: int) -> list[int]:
        return tokenizer(
            raw[place : place + 2000].decode(errors="ignore"), add_special_tokens=False
        ).input_ids

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
            and (
                tokens(p)[:31] == ids[1:].tolist() or (not start and tokens(p)[:32] == ids.tolist())
            )
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
    back = "".join(
        "".join(tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False).split())
        for ids in found.ids
    )
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
        (
            b"the quick brown fox jumps over a lazy dog",
            "found 9 tokens; give more text, or --length 4",
        ),
        (
            b"the quick \xff brown fox",
            "expected text in UTF-8, found another byte at 10; convert it",
        ),
        (
            b"the quick brown \xe6\x9d",
            "expected text in UTF-8, found another byte at 16; convert it",
        ),
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


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="no file here whose first byte cannot be read"
)
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


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="no file here whose first byte cannot be read"
)
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


def test_all_tokens_that_a_tokenizer_puts_first_stand_first_and_do_not_count(
    tmp_path: Path,
) -> None:
    """As GLM's, `[gMASK]<sop>`, of which none is the token that begins a text by name."""
    save(tmp_path, "words")
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": t, "type_id": 0}} for t in ("<|im_start|>", "<s>")]
    single += [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ]
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
    with pytest.raises(
        UsageError, match="--length: expected more than the 2 tokens that the tokenizer puts before"
    ):
        read(tmp_path / "t.txt", length=2)


def test_whose_tokenizer(tmp_path: Path) -> None:
    """The adapter's where a merged model would have it: its chat template is what it was trained with."""
    base, adapter = three_shards(tmp_path)
    save(base)
    assert tokenizer_directory(make_plan(base, adapter)) == base
    save(adapter, template=CHATML)
    assert merge(base, adapter, tmp_path / "out", 1)["tokenizer"] == "adapter"
    assert tokenizer_directory(make_plan(base, adapter)) == adapter
    (adapter / "tokenizer.json").unlink()
    assert tokenizer_directory(make_plan(base, adapter)) == base
    tuned = shutil.copytree(base, tmp_path / "tuned")
    weights = tuned / "model-00001-of-00003.safetensors"
    save_file({k: 2 * v for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert tokenizer_directory(make_plan(base, tuned)) == tuned


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_documents(kind: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, kind)
    texts = [prose(20 + i, seed=i) for i in range(10)]
    found = read(
        lines(tmp_path / "t.jsonl", *({"text": t} for t in texts), ""), sequences=4, length=16
    )
    for i, ids, counted in zip((0, 2, 5, 7), found.ids, found.counted, strict=True):
        assert ids.tolist() == tokenizer(texts[i]).input_ids[:16]
        assert counted.tolist() == [False, *[True] * 15]


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("the quick brown", " fox jumps over"), ("東京 🦊 is", " straße\n"), ("", "the dog")],
)
def test_of_prompt_and_completion_the_completion_counts(
    kind: str, prompt: str, completion: str, tmp_path: Path
) -> None:
    tokenizer = save(tmp_path, kind)
    line = {"prompt": prompt, "completion": completion}
    found = read(lines(tmp_path / "t.jsonl", line, line))
    whole = tokenizer(prompt + completion).input_ids
    before = tokenizer(prompt).input_ids
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


def assert_masks(tokenizer: Any, talks: list[list[dict[str, Any]]], path: Path) -> None:
    """Of each talk the answers count as the template itself marks them."""
    found = read(lines(path, *({"messages": messages} for messages in talks)))
    for messages, ids, counted in zip(talks, found.ids, found.counted, strict=True):
        made = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids.tolist() == made["input_ids"]
        assert counted.tolist() == [bool(m) for m in made["assistant_masks"]]
        assert counted.any()


def test_of_messages_the_answers_count_as_the_template_itself_marks_them(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, template=CHATML)
    talks = [
        [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}],
        [
            {"role": "system", "content": "a lazy dog"},
            *(
                {"role": r, "content": f"{r} {w}"}
                for w in ("the fox", "東京", "jugs")
                for r in ("user", "assistant")
            ),
        ],
        [
            {"role": "user", "content": "boxes"},
            {"role": "assistant", "content": "\n\nliquor\n"},
            {"role": "user", "content": "dog"},
        ],
    ]
    assert_masks(tokenizer, talks, tmp_path / "t.jsonl")


PROMPTLESS = """{% for m in messages %}{{ '### ' + m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"""
THINKING = """{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}\
{{ m.content.split('</think>')[-1] + '</s>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<assistant><think>\\n' }}{% endif %}"""
"""As those of models that reason, whose answers are rendered without the thought that the prompt opens."""


@pytest.mark.parametrize("template", [PROMPTLESS, THINKING])
def test_answers_without_the_prompt_that_the_template_has(template: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, template=template)
    talk = [
        {"role": r, "content": f"{r} {w}"}
        for w in ("the fox", "jugs")
        for r in ("user", "assistant")
    ]
    talk[1]["content"] = "assistant"  # as in the words before it
    talks = [talk, talk[1:], [{"role": "user", "content": f"What is {MARK}?"}, *talk[1:]]]
    assert_masks(tokenizer, talks, tmp_path / "t.jsonl")


PARTS = """{% for m in messages %}{{ '### ' + m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}\
{{ '[CALL]' if m.calls is defined else m.content[0].text }}{% endgeneration %}{% else %}{{ m.content[0].text }}{% endif %}\
{{ '\\n' }}{% endfor %}"""


def test_answers_in_parts_and_calls_of_tools(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, template=PARTS)
    question = {"role": "user", "content": [{"type": "text", "text": "the fox"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "jugs"}]}
    call = {"role": "assistant", "content": None, "calls": ["weather"]}
    talks = [[question, answer], [question, call, question, answer]]
    found = read(lines(tmp_path / "t.jsonl", *({"messages": m} for m in talks)))
    for messages, ids, counted in zip(talks, found.ids, found.counted, strict=True):
        made = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids.tolist() == made["input_ids"]
        masks = np.array(made["assistant_masks"], bool)
        assert all(counted[masks])
        assert counted.tolist()[-5:] == masks.tolist()[-5:]
    two = {
        **question,
        "content": [*question["content"], {"type": "text", "text": "and a dog"}],
    }  # the template writes the first part
    with pytest.raises(FormatError, match="as a list of parts"):
        read(lines(tmp_path / "t.jsonl", {"messages": [two, answer]}))


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    save(tmp_path, "words")
    path = lines(tmp_path / "t.jsonl", {"text": "the quick brown fox"}, {"text": "the dog"})
    plain = read(path).ids
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [ids.tolist() for ids in read(path).ids] == [ids.tolist() for ids in plain]


TEXT = {"type": "text", "text": "the fox"}


@pytest.mark.parametrize(
    ("question", "answer", "words"),
    [
        (
            {"content": [TEXT]},
            {"content": "jugs"},
            "does not support 'content' as a list of parts; give it as one string",
        ),
        (
            {"content": [TEXT, {"type": "image"}]},
            {"content": "jugs"},
            "expected only parts of type 'text' in 'content', found {'type': ",
        ),
        (
            {"content": "fox"},
            {"content": "jugs", "tool_calls": [{"function": {"name": "f"}}]},
            "ignores 'tool_calls'",
        ),
        (
            {"content": "fox"},
            {"content": "jugs", "function_call": {"name": "f"}},
            "ignores 'function_call'",
        ),
        (
            {"content": [{"type": "image", "text": "", "image": "a.png"}]},
            {"content": "jugs"},
            "expected only parts of type 'text'",
        ),
    ],
)
def test_what_a_template_does_not_write(
    question: Any, answer: Any, words: str, tmp_path: Path
) -> None:
    """The model would see another text."""
    save(tmp_path, template=PROMPTLESS)
    messages = [{"role": "user", **question}, {"role": "assistant", **answer}]
    with pytest.raises(FormatError, match=re.escape(words)):
        read(lines(tmp_path / "t.jsonl", {"messages": messages}))


def test_an_answer_is_cut_at_the_end(tmp_path: Path) -> None:
    save(tmp_path, "words")
    line = {"prompt": "the quick", "completion": " brown fox jumps over"}
    found = read(lines(tmp_path / "t.jsonl", line, line), length=5)
    assert found.counted[0].tolist() == [False, False, False, True, True]


def test_a_prompt_longer_than_a_sequence_loses_its_beginning(tmp_path: Path) -> None:
    tokenizer = save(tmp_path, "words")
    line = {"prompt": "the quick brown fox jumps over a lazy", "completion": " dog jumps over"}
    found = read(lines(tmp_path / "t.jsonl", line, line), length=6)
    start, *ids = tokenizer(line["prompt"] + line["completion"])["input_ids"]
    assert found.ids[0].tolist() == [start, *ids[6:]]
    assert found.counted[0].tolist() == [False, False, False, True, True, True]
    line["completion"] += " a lazy dog and more"  # as much of a longer answer as of its prompt
    found = read(lines(tmp_path / "t.jsonl", line, line), length=6)
    assert (found.ids[0].tolist(), found.counted[0].tolist()[2:]) == (
        [start, *ids[6:]],
        [False, True, True, True],
    )


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "dog"}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "expected a JSON object, found other text: "),
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
        (
            {"messages": "a"},
            "expected 'messages' to be a list of objects with 'role' and 'content'",
        ),
        (
            {"messages": [{"content": "a"}]},
            "expected 'messages' to be a list of objects with 'role' and 'content'",
        ),
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


@pytest.mark.parametrize(
    "line", [{"text": "the dog"}, {"prompt": "the", "completion": " dog"}, {"messages": MESSAGES}]
)
def test_keys_that_say_nothing_of_the_text_are_ignored(
    line: dict[str, Any], tmp_path: Path
) -> None:
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
        match="so that answer 1 cannot be found; give one line for each answer, with the messages up to it",
    ):
        read(lines(tmp_path / "t.jsonl", {"messages": both}))
    assert (
        read(lines(tmp_path / "t.jsonl", {"messages": MESSAGES}, {"messages": MESSAGES})).tokens > 0
    )


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = save(tmp_path, template=DATED)
    path = lines(tmp_path / "t.jsonl", *[{"messages": MESSAGES}] * 2)
    expected = tokenizer.apply_chat_template(MESSAGES, date_string="26 Jul 2024")["input_ids"]
    assert read(path).ids[0].tolist() == expected

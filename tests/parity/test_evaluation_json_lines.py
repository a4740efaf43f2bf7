"""Lines of JSON become the tokens that transformers makes of them; of answers count those that its own masks say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenized_texts import CHATML, DATED, FORGETFUL, lines, prose, read, save

from streamer.errors import FormatError
from streamer.measuring.json_lines import MARK


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


PROMPTLESS = """{% for m in messages %}{{ '### ' + m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\\n' }}{% endfor %}"""
THINKING = """{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}\
{{ m.content.split('</think>')[-1] + '</s>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<assistant><think>\\n' }}{% endif %}"""
"""As those of models that reason, whose answers are rendered without the thought that the prompt opens."""


@pytest.mark.parametrize("template", [PROMPTLESS, THINKING])
def test_answers_without_the_prompt_that_the_template_has(template: str, tmp_path: Path) -> None:
    tokenizer = save(tmp_path, template=template)
    talk = [{"role": r, "content": f"{r} {w}"} for w in ("the fox", "jugs") for r in ("user", "assistant")]
    talk[1]["content"] = "assistant"  # as in the words before it
    talks = [talk, talk[1:], [{"role": "user", "content": f"What is {MARK}?"}, *talk[1:]]]
    found = read(lines(tmp_path / "t.jsonl", *({"messages": m} for m in talks)))
    for messages, ids, counted in zip(talks, found.ids, found.counted, strict=True):
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ids.tolist() == made["input_ids"]
        assert counted.tolist() == [bool(m) for m in made["assistant_masks"]]


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
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
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
        ({"content": [TEXT]}, {"content": "jugs"}, "does not support 'content' as a list of parts; give it as one string"),
        ({"content": [TEXT, {"type": "image"}]}, {"content": "jugs"}, "expected only parts of type 'text' in 'content', found {'type': "),
        ({"content": "fox"}, {"content": "jugs", "tool_calls": [{"function": {"name": "f"}}]}, "ignores 'tool_calls'"),
        ({"content": "fox"}, {"content": "jugs", "function_call": {"name": "f"}}, "ignores 'function_call'"),
        ({"content": [{"type": "image", "text": "", "image": "a.png"}]}, {"content": "jugs"}, "expected only parts of type 'text'"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_write(question: Any, answer: Any, words: str, tmp_path: Path) -> None:
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
        match="so that answer 1 cannot be found; give one line for each answer, with the messages up to it",
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

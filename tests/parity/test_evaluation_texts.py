"""Texts as sequences of tokens: as transformers' own tokenizer writes them, with the tokens that count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from streamer.errors import FormatError, MissingInputError
from streamer.evaluation.texts import TokenizerOf, read_text

WORDS = ["<s>", "</s>", "<unk>", "[user]", "[answer]", "one", "two", "three", "four", "five", "six"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}[user] {{ m.content }} {% else %}[answer] {{ m.content }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[answer] {% endif %}"
)


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no bos"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of a few words, which begins a text with ``<s>`` or with nothing; saved."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if request.param:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    whole = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    whole.chat_template = TEMPLATE
    directory = tmp_path_factory.mktemp("tokenizer")
    whole.save_pretrained(directory)
    return TokenizerOf(directory)


def read(path: Path, content: str, tokenizer: Any, sequences: int = 8, length: int = 8) -> list[list[str]]:
    """Its sequences; a token that counts has a sign."""
    path.write_text(content)
    found = read_text(path, tokenizer, sequences, length)
    return [[WORDS[i] + ("*" if j else "") for i, j in zip(s.ids, s.judged, strict=True)] for s in found.sequences]


def test_a_text_is_cut_each_sequence_begun_as_the_tokenizer_does(tokenizer: Any, tmp_path: Path) -> None:
    found = read(tmp_path / "a.txt", "one two three four five six one", tokenizer, length=4)
    if tokenizer.start:
        assert found == [["<s>", "one*", "two*", "three*"], ["<s>", "four*", "five*", "six*"], ["<s>", "one*"]]
    else:
        assert found == [["one", "two*", "three*", "four*"], ["five", "six*", "one*"]]


def test_lines_with_a_text(tokenizer: Any, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": text}) for text in ("one two", "", "three four five"))
    begun = ["<s>"] if tokenizer.start else []
    found = read(tmp_path / "a.jsonl", lines + "\n\n", tokenizer)
    expected = [[*begun, "one", "two*"], [*begun, "three", "four*", "five*"]]
    assert found == [[w if i == 0 or w.endswith("*") else f"{w}*" for i, w in enumerate(row)] for row in expected]


def test_of_a_prompt_and_its_completion_the_completion_counts(tokenizer: Any, tmp_path: Path) -> None:
    begun = ["<s>"] if tokenizer.start else []
    line = json.dumps({"prompt": "one two", "completion": "three four", "id": 7})
    assert read(tmp_path / "a.jsonl", line, tokenizer) == [[*begun, "one", "two", "three*", "four*"]]


def test_of_messages_the_answers_count(tokenizer: Any, tmp_path: Path) -> None:
    said = [("user", "one"), ("assistant", "two three"), ("user", "four"), ("assistant", "five"), ("user", "six")]
    messages = [{"role": role, "content": content} for role, content in said]
    (found,) = read(tmp_path / "a.jsonl", json.dumps({"messages": messages}), tokenizer, length=32)
    begun = ["<s>"] if found[0] == "<s>" else []
    answers = ["two*", "three*", "</s>*"], ["five*", "</s>*"]
    assert found == [*begun, "[user]", "one", "[answer]", *answers[0], "[user]", "four", "[answer]", *answers[1]]
    whole = tokenizer.tokenizer.apply_chat_template(messages[:4], tokenize=True, return_dict=False)
    assert [WORDS[i] for i in whole] == [word.removesuffix("*") for word in found]


def test_a_line_that_is_cut_before_its_completion_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    lines = [{"prompt": "one two three four five", "completion": "six"}, {"prompt": "one", "completion": "two"}]
    found = read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)), tokenizer, length=5)
    assert [row[-2:] for row in found] == [["one", "two*"]]


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 2: bad JSON"),
    ("[1]", "line 2: expected an object with 'text'"),
    ('{"prompt": "one"}', "line 2: expected an object with 'text'"),
    ('{"messages": [{"content": "one"}]}', "line 2: the chat template cannot write these messages"),
    ('{"messages": [{"role": "user", "content": "one"}]}', "has no token whose loss could be taken"),
])  # fmt: skip
def test_lines_that_are_wrong(line: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        read(tmp_path / "a.jsonl", "\n" + line, tokenizer)


def test_a_text_that_is_not_utf8_or_has_no_tokens(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one \xff two")
    with pytest.raises(FormatError, match="is not UTF-8 at byte 4"):
        read_text(tmp_path / "a.txt", tokenizer, 1, 8)
    with pytest.raises(FormatError, match="has no token whose loss could be taken"):
        read(tmp_path / "b.txt", " \n", tokenizer)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        MissingInputError, match=r"transformers finds no tokenizer there .*give texts as \.npy files of token ids"
    ):
        read_text(tmp_path / "a.txt", TokenizerOf(tmp_path), 1, 8)

"""Files beside the weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamer.plan.tokenizer import token_count


@pytest.mark.parametrize("text", ["", "{}", "[", '{"model": {"vocab": {"a": 0', '{"model": {"vocab": {"a": "b"}}}'])
def test_what_is_no_vocabulary_is_not_counted(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert token_count(tmp_path) is None

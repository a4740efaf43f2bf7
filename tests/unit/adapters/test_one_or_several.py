"""Names of several adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import helpers
import pytest

from streamer.adapters.finetuned import AdapterPaths, holds_adapters, named_adapters, one_or_several


def test_a_directory_of_adapters_gives_their_names_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "a", ".hidden"):
        helpers.write_adapter(tmp_path / "many" / name, {}, r=1)
    assert holds_adapters(tmp_path / "many")
    assert not holds_adapters(tmp_path / "many" / "a")
    assert not holds_adapters(tmp_path / "nothing")
    assert one_or_several(str(tmp_path / "many" / "a")) == AdapterPaths.of_one(
        tmp_path / "many" / "a"
    )
    assert one_or_several(tmp_path / "many") == one_or_several([tmp_path / "many"])
    assert list(named_adapters([tmp_path / "many"])) == ["a", "b"]
    # A training run keeps its checkpoints inside: it is an adapter all the same.
    shutil.copy(tmp_path / "many/a/adapter_config.json", tmp_path / "many")
    assert not holds_adapters(tmp_path / "many")
    assert list(named_adapters([tmp_path / "many", tmp_path / "many" / "b" / ".." / "b"])) == [
        "many",
        "b",
    ]
    monkeypatch.chdir(tmp_path / "many")
    assert list(named_adapters([".", "b"])) == ["many", "b"]

"""Keys of an output's record as verification knows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streamer.verification.record import DIGEST, RECORD_NAME, SCHEMA, read_record

RECORD = {
    "schema": SCHEMA, "command": "merge", "version": "1", "base": {}, "adapter": {}, "detection": None, "method": "regmean", "scale": "all",
    "lambda": None, "to_lora": None, "dequantize": False, "totals": {}, "warnings": [], "notes": [], "advice": [], "left_out": [],
    "carried": [], "matrices": [], "plan": "", "files": [], "tokenizer": None,
}  # fmt: skip


@pytest.mark.parametrize(("more", "wrong"), [
    ({}, None),
    ({"coefficients": {"keep": 0.9, "sha256": "0"}}, None),
    ({"coefficients": [0.9]}, "coefficients"),
    ({DIGEST: "0", "coefficients": [0.9]}, "coefficients"),
    ({DIGEST: "0", "of a later version": 1}, None),
    ({"coeficients": {}}, "coeficients"),
    ({"lambda": "1"}, "lambda"),
])  # fmt: skip
def test_a_key_is_known_by_its_kind(more: dict[str, Any], wrong: str | None, tmp_path: Path) -> None:
    record = {**RECORD, **more}
    (tmp_path / RECORD_NAME).write_text(json.dumps(record))
    assert read_record(tmp_path) == (record if wrong is None else f"{wrong!r} missing, of another kind or unknown")

"""Files of large models: read in seconds, with few descriptors."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import helpers
import pytest
from two_shards import SHARDS, refusal, two_shards

import streamer
from streamer.detection.findings import load_findings
from streamer.errors import MissingInputError
from streamer.storage.checkpoint import INDEX_NAME, open_checkpoint
from streamer.storage.header import (
    layout,
    parse_header,
)


@pytest.mark.long
def test_a_large_index_is_quick(tmp_path: Path) -> None:
    """200,000 entries: read and compared with the shards in seconds, or refused at the first shard."""
    base = two_shards(tmp_path / "base")
    count = 200_000
    tree = {f"layers.{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)}
    body = json.dumps(tree).encode()
    (base / SHARDS[1]).write_bytes(struct.pack("<Q", len(body)) + body + bytes(count))
    good = {"a": SHARDS[0], "b": SHARDS[0]} | dict.fromkeys(tree, SHARDS[1])
    began = time.process_time()
    (base / INDEX_NAME).write_text(json.dumps({"weight_map": good}))
    assert len(open_checkpoint(base).weight_map) == count + 2
    (base / INDEX_NAME).write_text(json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(count)}}))
    assert "0.safetensors: no such file" in refusal(MissingInputError, base)
    assert time.process_time() - began < 15


def test_many_tensors_are_quick() -> None:
    began = time.process_time()
    header, raw = layout((f"model.layers.{i}.weight", "BF16", [4, 4]) for i in range(20_000))
    assert len(parse_header(raw, header.file_bytes, "x").by_name) == 20_000
    assert time.process_time() - began < 5


@pytest.mark.long
def test_findings_of_an_80_layer_model_open_few_files(tmp_path: Path) -> None:
    """560 matrices with three factors each, under the usual limit of descriptors."""
    import resource

    names = [f"layers.{i}.q" for i in range(560)]
    base = helpers.write_sharded(tmp_path / "base", [{f"{n}.weight": helpers.power_law(64, 48).float() for n in names}])
    adapter = helpers.write_adapter(tmp_path / "adapter", {n: helpers.intruding_factors(64, 48, 2) for n in names}, r=2)
    streamer.detect_intruder_dimensions(base, adapter, tmp_path / "f.safetensors")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        findings = load_findings(tmp_path / "f.safetensors")
        assert findings.intruders >= 560
        assert sum(float(m.detection.S.sum()) for m in findings) > 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

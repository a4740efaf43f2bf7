"""What rounding leaves unchanged in a merge is counted as numpy counts it in the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from causal_models import EXPERTS, make_adapter, make_base
from safetensors import safe_open

import streamer
from streamer.output.record_view import record_lines


def stored(directory: Path) -> dict[str, np.ndarray]:
    """The bytes of all tensors, as integers of their dtype's size."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).view(torch.int16).numpy() for name in file.keys()}  # noqa: SIM118  # no dict


CASES = {
    "attention and head": ("llama", ["q_proj", "o_proj", "lm_head"], {}),
    "Conv1D": ("gpt2", ["c_attn"], {}),
    "stacks of experts": ("gpt-oss", ["q_proj"], {"target_parameters": EXPERTS}),
}


@pytest.mark.parametrize("what", CASES)
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_values_that_kept_the_bases_bytes_are_counted(what: str, keep: float, tmp_path: Path) -> None:
    name, targets, options = CASES[what]
    base, out = tmp_path / "base", tmp_path / "out"
    cls = make_base(name, base, torch.bfloat16)
    adapter = make_adapter(cls, base, tmp_path / "adapter", targets, lora_alpha=0.05, **options)
    record = streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, out, method="shrink", mitigation_lambda=keep, on_event=str
    )
    before, after = stored(base), stored(out)
    for matrix in record["matrices"]:
        tensor, _, index = matrix["tensor"].removesuffix("]").partition("[")
        at = (int(index),) if index else ()
        a, b = before[tensor][at], after[tensor][at]
        assert (matrix["values"], matrix["rounded_away"]) == (a.size, int((a == b).sum())), matrix["tensor"]
    totals = record["totals"]
    assert 0 < totals["rounded_away"] < totals["values"] == sum(m["values"] for m in record["matrices"])
    share = f"rounding left {100 * totals['rounded_away'] / totals['values']:.1f}% of the values in these matrices unchanged"
    assert any(line.startswith(share) for line in record_lines(record, "out"))
    streamer.verify_output(out)


def test_of_a_delta_of_zero_nothing_is_counted(tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", ["q_proj"])
    record = streamer.merge_with_reduced_intruder_dimensions(
        tmp_path / "base", adapter, tmp_path / "out", method="shrink", mitigation_lambda=0
    )
    assert all("values" not in matrix for matrix in record["matrices"])
    assert record["totals"]["values"] == 0
    assert not any("rounding" in line for line in record_lines(record, "out"))


def test_a_share_that_would_show_as_zero_is_not_shown(tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base", torch.float32)
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", ["q_proj"])
    record = streamer.merge_with_reduced_intruder_dimensions(
        tmp_path / "base", adapter, tmp_path / "out", method="shrink", mitigation_lambda=1
    )
    assert 0 <= record["totals"]["rounded_away"] < 0.0005 * record["totals"]["values"]
    assert not any("rounding" in line for line in record_lines(record, "out"))

"""Every kind of adapter in a live model: what files give, to the last bit, and what PEFT's model computes."""

from __future__ import annotations

from pathlib import Path

import kinds_cases
import pytest
import torch
from kinds import APART, DTYPES
from kinds_cases import quiet, relative
from live import adapter_state, assert_equal, assert_same_findings, load_state, loaded, of_peft
from pairs import mitigate

import streamer
import streamer.peft as live
from streamer.errors import UnsupportedError, UsageError

# One of each way in which a live model is read or written; all the others are slow.
CHOSEN = {
    "linear", "fan_in_fan_out", "embedding", "conv2d, lora_bias", "modules_to_save", "bias=all", "resized, saved modules",
    "DoRA, embedding", "PiSSA", "AdaLoRA", "VeRA", "BOFT", "tied, lm_head", "tied, embedding", "tied, one delta", "tied, tokens",
    "tied, tokens of lm_head",
    "trainable tokens",
}  # fmt: skip
IN_BF16 = {"linear", "DoRA", "modules_to_save", "tied, both"}
CASES = [
    pytest.param(
        kind,
        dtype,
        marks=[] if kind in (IN_BF16 if dtype == "bf16" else CHOSEN) else [pytest.mark.slow],
        id=f"{kind}-{dtype}",
    )
    for kind in kinds_cases.KINDS
    for dtype in DTYPES
    if (kind, dtype) not in APART
]

# PEFT has one adapter of these kinds at a time, or makes the second one another.
ALONE = {
    "bias=all": "PEFT adds no second one",
    "bias=lora_only": "PEFT adds no second one",
    "lora_bias, bias=all": "PEFT adds no second one",
    "tied, one delta": "other tensors",
    "tied, one delta of lm_head": "other tensors",
}

UNMERGEABLE = {"OFT, conv2d"}
"""Kinds of which PEFT's own merge does not compute what its layers do."""


@pytest.mark.long
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_kind_in_memory_equals_its_files(name: str, dtype: str, tmp_path: Path) -> None:
    made = kinds_cases.make(name, DTYPES[dtype], tmp_path)
    options = made.kind.options
    model = loaded(made)
    with quiet():
        on_files = streamer.detect_intruder_dimensions(made.base, made.adapter, **options)
        on_model = live.detect_intruder_dimensions(model)
        assert_same_findings(on_files, on_model)
        check_reduced(made, model, on_files, on_model, tmp_path)
        merged = live.merge_and_unload_with_reduced_intruder_dimensions(
            model, mitigation_lambda=0.5, findings=on_files
        )
        theirs = dict(
            streamer.iter_merged(
                made.base, made.adapter, mitigation_lambda=0.5, findings=on_model, **options
            )
        )
        assert_equal(kinds_cases.by_disk(merged.state_dict(), theirs), theirs)
        assert not of_peft(merged)
        if dtype == "fp32" and name not in UNMERGEABLE:
            check_outputs(made)


def check_reduced(
    made: kinds_cases.Made,
    model: torch.nn.Module,
    on_files: streamer.Findings,
    on_model: streamer.Findings,
    path: Path,
) -> None:
    """The new adapter is that of files, by findings of either place; the old one is as it was, and so is a model that is refused."""
    before = adapter_state(model, "default")
    refusal = ALONE.get(next(n for n, kind in kinds_cases.KINDS.items() if kind is made.kind))
    if refusal is None and not made.kind.mitigate:
        refusal = "has no form in this kind of adapter"
    if refusal:
        with pytest.raises(UnsupportedError, match=refusal):
            live.reduce_intruder_dimension(model, mitigation_lambda=0.5, findings=on_files)
        assert list(model.peft_config) == ["default"]
        assert model.active_adapter == "default"
    else:
        found = live.reduce_intruder_dimension(model, mitigation_lambda=0.5, findings=on_files)
        assert found is not None
        assert_same_findings(found, on_files)
        mitigate(made.base, made.adapter, path / "out", 0.5, findings=on_model, **made.kind.options)
        new = adapter_state(model, "intruder_reduced")
        theirs = load_state(path / "out")
        assert new.keys() <= theirs.keys()
        for name, tensor in new.items():
            assert torch.equal(tensor, theirs[name]), name
            assert tensor.dtype == before[name].dtype
        assert model.active_adapter == "intruder_reduced"
    after = adapter_state(model, "default")
    assert after.keys() == before.keys()
    assert_equal(after, before)


def check_outputs(made: kinds_cases.Made) -> None:
    """At λ = 1 the merged model computes what PEFT's model with its adapter does."""
    model = loaded(made)
    x = kinds_cases.inputs(model)
    with torch.no_grad():
        expected = kinds_cases.values(model(*x))
        merged = live.merge_and_unload_with_reduced_intruder_dimensions(
            model, mitigation_lambda=1.0
        ).eval()
        assert relative(kinds_cases.values(merged(*x)), expected) < 5e-6


@pytest.mark.parametrize("name", ["a.b", "", "forward", 3])
def test_names_that_peft_cannot_use(name: object, tmp_path: Path) -> None:
    model = loaded(kinds_cases.make("linear", torch.float32, tmp_path))
    with pytest.raises(
        UsageError, match=rf"^new_adapter_name: expected a name .*, found {name!r}$"
    ):
        live.reduce_intruder_dimension(model, new_adapter_name=name)  # type: ignore[arg-type]
    assert list(model.peft_config) == ["default"]

"""Detect in, mitigate on and merge into a tiny Llama in every encoding; the oracles are PEFT, transformers, and the decoded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pairs import merge, mitigate
from peft import PeftModel
from quantized_cases import FP8, Case, all_tensors, decoded_base, merged_by_peft, usual_names
from quantized_layers import MAKERS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import streamer
from streamer.errors import UnsupportedError


@pytest.fixture(scope="module", params=list(MAKERS))
def case(
    request: pytest.FixtureRequest,
    plain: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    directory = tmp_path_factory.mktemp(request.param)
    made = MAKERS[request.param](directory / "base", plain[0])
    return Case(request.param, made, plain[1], decoded_base(directory / "decoded", plain[0], made))


@pytest.mark.long
def test_detection_and_mitigation_are_those_on_the_decoded_base(case: Case, tmp_path: Path) -> None:
    assert set(case.made.decoded) == {
        m.tensor for m in streamer.detect_intruder_dimensions(case.decoded, case.adapter)
    }
    theirs = streamer.detect_intruder_dimensions(
        case.decoded, case.adapter, tmp_path / "a.safetensors", solver="certified"
    )
    for io in ("mmap", "pread"):
        ours = streamer.detect_intruder_dimensions(
            case.made.base, case.adapter, solver="certified", io=io
        )
        mine = {m.tensor: m.detection for m in ours}
        for m in theirs:
            assert mine[m.tensor].singular_values == m.detection.singular_values
            assert mine[m.tensor].similarity == m.detection.similarity
    assert ours.intruders > 0
    for base, out in ((case.made.base, "x"), (case.decoded, "y")):
        mitigate(base, case.adapter, tmp_path / out, 0.5)
    x, y = (load_file(tmp_path / out / "adapter_model.safetensors") for out in "xy")
    assert all(torch.equal(x[k], y[k]) for k in y)


def test_dequantized_merge_is_the_merge_on_the_decoded_base_rounded_once(
    case: Case, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    record = merge(case.made.base, case.adapter, out, 1, dequantize=True)
    tensors = all_tensors(out)
    assert {m["tensor"] for m in record["matrices"]} == set(case.made.decoded)
    exact = merged_by_peft(case.decoded, case.adapter)
    assert set(tensors) == set(exact)
    for name, t in tensors.items():
        assert t.dtype == torch.bfloat16
        rounded = exact[name].to(torch.bfloat16)
        # float32 sums may fall on the other side of a tie
        assert (t != rounded).float().mean() < 2e-3, name
        # near 0, where the sum cancels, by float32's rounding of its summands
        rounding = torch.finfo(torch.float32).eps * float(exact[name].abs().max())
        assert torch.allclose(t.double(), rounded.double(), rtol=2**-7, atol=rounding), name
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not list(out.glob("*quant*_config.json"))
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            assert f.metadata().keys() == {"format", "streamer"}
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = model(torch.arange(1, 9)[None]).logits
    reference = AutoModelForCausalLM.from_pretrained(case.decoded, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(reference, case.adapter)(torch.arange(1, 9)[None]).logits
    assert (logits.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    if (out / "model.safetensors.index.json").exists():
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_what_is_not_touched_is_dequantized_as_well(case: Case, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(case.adapter, adapter)
    factors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k: t for k, t in factors.items() if "layers.0." in k},
        adapter / "adapter_model.safetensors",
    )
    merge(case.made.base, adapter, tmp_path / "out", 1, dequantize=True)
    tensors = all_tensors(tmp_path / "out")
    for name, t in case.made.decoded.items():
        assert torch.equal(tensors[name], t.to(torch.bfloat16)) == ("layers.1." in name)
    if case.name not in FP8:
        message = r"7 of the weights to merge into are quantized, 'model\.layers\.0\..*' first \(.*\).*--dequantize writes"
        with pytest.raises(UnsupportedError, match=message):
            merge(case.made.base, adapter, tmp_path / "no", 1)
        with pytest.raises(UnsupportedError, match="--dequantize"):
            streamer.iter_merged(case.made.base, adapter, mitigation_lambda=1)
        assert not (tmp_path / "no").exists()


def ways(case: Case) -> list[dict[str, bool]]:
    """The ways to write a merge into this base."""
    return (
        [{"dequantize": True}, {"dequantize": False}]
        if case.name in FP8
        else [{"dequantize": True}]
    )


@pytest.mark.long
def test_the_stream_of_tensors_is_what_the_files_hold(case: Case, tmp_path: Path) -> None:
    for i, way in enumerate(ways(case)):
        out = tmp_path / str(i)
        merge(case.made.base, case.adapter, out, 0.5, **way)
        tensors = all_tensors(out)
        got = usual_names(
            dict(streamer.iter_merged(case.made.base, case.adapter, mitigation_lambda=0.5, **way))
        )
        assert got.keys() == tensors.keys()
        for name, t in got.items():
            assert t.dtype == tensors[name].dtype
            assert torch.equal(
                t.flatten().view(torch.uint8), tensors[name].flatten().view(torch.uint8)
            ), name

"""Adapters by a fit or a map, loaded by PEFT: of the adapter's own rank, with the logits of the merged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fitted
import numpy as np
import peft
import pytest
import torch
from fitted import answer, energy_form, random_map
from kinds import llama_config
from safetensors.torch import load_file
from seeds import vary
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from verified import agree, edit_tensor

import streamer
from streamer.errors import MismatchError, MissingInputError, StreamerWarning, VerificationError

CASES: dict[str, dict[str, Any]] = {
    "lora": {
        "target_modules": ["q_proj", "down_proj"],
        "alpha_pattern": {r".*layers.1.self_attn.q_proj": 3},
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
    },
    "rslora": {"use_rslora": True, "target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(vary(0))
    path = tmp_path_factory.mktemp("fitted") / "base"
    LlamaForCausalLM(llama_config()).save_pretrained(path)
    return path


def trained(base: Path, path: Path, options: dict[str, Any]) -> Path:
    torch.manual_seed(vary(1))
    model = peft.get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path, save_embedding_layers=False)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(torch.arange(40)[None]).logits[0]


LAMBDA = 0.4


@pytest.mark.parametrize("how", ["fit", "map"])
@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_adapter_and_its_logits_are_the_merged_models(
    base: Path, how: str, case: str, tmp_path: Path
) -> None:
    adapter = trained(base, tmp_path / "adapter", CASES[case])
    file = tmp_path / "c.safetensors"
    (fitted.random_coefficients if how == "fit" else random_map)(base, adapter).save(file)
    options: dict[str, Any] = {"coefficients": file} if how == "fit" else {"map": file}
    strength = {} if how == "fit" else {"mitigation_lambda": LAMBDA}
    record = streamer.reduce_intruder_dimension(
        base, adapter, tmp_path / "a", **options, **strength
    )
    streamer.merge_with_reduced_intruder_dimensions(
        base, adapter, tmp_path / "m", **options, **strength
    )
    if how == "map":
        facts = record["method"], record["lambda"], record["totals"]["changed"]
        assert facts == ("nullspace", LAMBDA, len(record["matrices"]))
    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "a")
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m"))
    # float32 weights: W0 + Δ' was rounded once, B' and A as well.
    torch.testing.assert_close(logits(model), merged, rtol=0, atol=2e-6 * float(merged.abs().max()))
    assert float((merged - logits(LlamaForCausalLM.from_pretrained(base))).abs().max()) > 1e-2
    for output in ("a", "m"):
        found = streamer.verify_output(tmp_path / output, base, adapter, sample="all", **options)[
            "totals"
        ]
        assert found["recomputed"] == found["matrices"] == len(record["matrices"])
    config = "adapter_config.json"
    assert json.loads((tmp_path / "a" / config).read_text()) == json.loads(
        (adapter / config).read_text()
    )
    before, after = (
        load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "a")
    )
    assert {name: t.shape for name, t in after.items()} == {
        name: t.shape for name, t in before.items()
    }
    for name, tensor in before.items() if how == "map" else ():
        assert torch.equal(tensor, after[name]) == ("_B" in name), name


@pytest.mark.parametrize("case", CASES)
def test_it_is_its_formula_on_pefts_own_delta(base: Path, tmp_path: Path, case: str) -> None:
    adapter = trained(base, tmp_path / "adapter", CASES[case])
    inputs = random_map(base, adapter)
    model = peft.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base).double(), adapter
    ).double()
    W0 = {
        name: t.clone()
        for name, t in LlamaForCausalLM.from_pretrained(base).double().state_dict().items()
    }
    tuned = model.merge_and_unload().state_dict()
    found = dict(streamer.iter_merged(base, adapter, map=inputs, mitigation_lambda=LAMBDA))
    for one in inputs.inputs:
        (name,) = one.names
        delta = (tuned[name] - W0[name]).numpy()
        delta = delta.T if one.vectors is None else delta
        expected = answer(delta, energy_form(one), LAMBDA)
        expected = expected.T if one.vectors is None else expected
        np.testing.assert_allclose(found[name].double() - W0[name], expected, atol=1e-6)
    others = found.keys() - {one.names[0] for one in inputs.inputs}
    assert all(torch.equal(found[name].double(), W0[name]) for name in others)


def test_what_the_map_lacks_stays_and_is_named(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", CASES["lora"])
    inputs = random_map(base, adapter, lacks="layers.1.self_attn")
    with pytest.warns(
        StreamerWarning,
        match=r"no inputs of 1 matrix, 'model.layers.1.self_attn.q_proj.weight': what",
    ):
        record = streamer.reduce_intruder_dimension(base, adapter, tmp_path / "a", map=inputs)
    assert record["totals"]["changed"] == len(record["matrices"]) - 1
    inputs.save(tmp_path / "m.safetensors")
    assert streamer.verify_output(
        tmp_path / "a", base, adapter, sample="all", map=tmp_path / "m.safetensors"
    )
    with pytest.raises(MismatchError, match="has the inputs of none of the adapter's matrices"):
        streamer.reduce_intruder_dimension(
            base, adapter, tmp_path / "b", map=random_map(base, adapter, lacks="model")
        )


def test_verification_needs_the_map_and_finds_a_wrong_value(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", CASES["lora"])
    random_map(base, adapter).save(tmp_path / "m.safetensors")
    random_map(base, adapter, seed="b").save(tmp_path / "other.safetensors")
    options = {"map": tmp_path / "m.safetensors", "mitigation_lambda": 0.4}
    streamer.reduce_intruder_dimension(base, adapter, tmp_path / "0.4", **options)
    assert streamer.verify_output(tmp_path / "0.4", base, adapter)["totals"]["recomputed"] == 3
    (tmp_path / "m.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(
        MissingInputError, match=r"found no 'm.safetensors' beside it; pass the file with --map"
    ):
        streamer.verify_output(tmp_path / "0.4", base, adapter)
    with pytest.raises(MismatchError, match="is not the map with digest"):
        streamer.verify_output(tmp_path / "0.4", base, adapter, map=tmp_path / "other.safetensors")
    with pytest.raises(
        MismatchError, match=r"adapter_model.safetensors: is not the map with digest"
    ):
        streamer.verify_output(
            tmp_path / "0.4", base, adapter, map=adapter / "adapter_model.safetensors"
        )
    weights = tmp_path / "0.4" / "adapter_model.safetensors"
    name = next(name for name in load_file(weights) if "lora_A" in name)
    edit_tensor(weights, name, lambda tensor: tensor.mul_(1.01))
    agree(tmp_path / "0.4", weights.name)
    with pytest.raises(VerificationError, match="the nearest factors to Δ' within one rounding"):
        streamer.verify_output(
            tmp_path / "0.4", base, adapter, sample="all", map=tmp_path / "moved.safetensors"
        )


def test_several_adapters_take_one_map(base: Path, tmp_path: Path) -> None:
    adapters = [trained(base, tmp_path / name, CASES["rslora"]) for name in ("a", "b")]
    inputs = random_map(base, adapters[0])
    records = streamer.reduce_intruder_dimension(base, adapters, tmp_path / "out", map=inputs)
    assert all(record["map"]["sha256"] == inputs.digest for record in records.values())

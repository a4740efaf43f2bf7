"""`mitigate --for-server`: deltas by a server's one rule equal those by PEFT's rules."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import EXPERTS, make_adapter, make_base
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import streamer
from streamer.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

PATTERNS = {
    "rank_pattern": {"q_proj": 5, "layers.1.self_attn.o_proj": 12},
    "alpha_pattern": {"o_proj": 24},
}
CASES: dict[str, dict[str, Any]] = {
    "patterns": PATTERNS,
    "rsLoRA": {"use_rslora": True},
    "both": {**PATTERNS, "use_rslora": True},
}
EXPERT_PATTERNS = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 24}}


def serve(base: Path, adapter: Path, output: Path, **options: Any) -> dict[str, Any]:
    return dict(
        streamer.reduce_intruder_dimension(base, adapter, output, for_server=True, **options)
    )


def logits(cls: Any, base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(cls.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20)).logits


@pytest.mark.parametrize("case", CASES)
def test_scales_of_dense_modules_are_equal(tmp_path: Path, case: str) -> None:
    cls = make_base("llama", tmp_path / "base")
    make_adapter(
        cls,
        tmp_path / "base",
        tmp_path / "adapter",
        ["q_proj", "o_proj", "up_proj"],
        r=4,
        lora_alpha=8,
        **CASES[case],
    )
    record = serve(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", mitigation_lambda=1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    rank = 8 if case == "rsLoRA" else 16
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert len(layers) == 6
    for name, layer in layers.items():
        A, B = (written[f"{name}.lora_{side}.weight"] for side in "AB")
        assert (A.shape[0], B.shape[1]) == (rank, rank)
        served = config["lora_alpha"] / config["r"] * B.double() @ A.double()
        scaling = layer.scaling["default"]
        wanted = (
            scaling
            * layer.lora_B["default"].weight.double()
            @ layer.lora_A["default"].weight.double()
        )
        exact = scaling == 2.0 ** round(torch.log2(torch.tensor(scaling)).item())
        torch.testing.assert_close(
            served, wanted, rtol=0, atol=0 if exact else 1e-6 * float(wanted.abs().max())
        )
    assert max(m["dropped"] for m in record["matrices"]) < 1e-6
    verified = streamer.verify_output(
        tmp_path / "out", tmp_path / "base", tmp_path / "adapter", sample="all"
    )
    assert verified["totals"]["not_compared"] == 0


@pytest.mark.parametrize("case", CASES)
def test_experts_answer_as_before(tmp_path: Path, case: str) -> None:
    cls = make_base("mixtral", tmp_path / "base")
    options = {**CASES[case], **({} if case == "rsLoRA" else EXPERT_PATTERNS)}
    make_adapter(
        cls,
        tmp_path / "base",
        tmp_path / "adapter",
        ["q_proj"],
        r=4,
        lora_alpha=8,
        target_parameters=EXPERTS,
        **options,
    )
    serve(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", mitigation_lambda=1)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["alpha_pattern"]) == (
        8,
        8,
        False,
        {},
    )
    wanted, found = (logits(cls, tmp_path / "base", tmp_path / name) for name in ("adapter", "out"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_mitigated_and_half_precision_factors_tell_what_rounding_loses(tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base")
    adapter = make_adapter(
        cls, tmp_path / "base", tmp_path / "adapter", ["q_proj"], r=6, lora_alpha=8, use_rslora=True
    )
    model = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), adapter).to(
        torch.bfloat16
    )
    model.save_pretrained(tmp_path / "half")
    record = serve(
        tmp_path / "base",
        tmp_path / "half",
        tmp_path / "out",
        method="shrink",
        mitigation_lambda=0.3,
    )
    lost = [m["dropped"] for m in record["matrices"]]
    assert 1e-4 < min(lost) <= max(lost) < 5e-3
    streamer.verify_output(tmp_path / "out", tmp_path / "base", tmp_path / "half", sample="all")


@pytest.mark.parametrize("rank", [6, 40])
def test_what_is_truncated_is_verified(tmp_path: Path, rank: int) -> None:
    """Of scaled intruders, of which the adapter's rank does not hold all; and of a rank above the matrix's sides."""
    cls = make_base("llama", tmp_path / "base")
    adapter = make_adapter(
        cls,
        tmp_path / "base",
        tmp_path / "adapter",
        ["q_proj", "up_proj"],
        r=rank,
        lora_alpha=2 * rank,
    )
    record = serve(
        tmp_path / "base", adapter, tmp_path / "out", mitigation_lambda=0.3, threshold_epsilon=0.9
    )
    assert record["totals"]["intruders"] > 0
    assert (rank > 32) or record["totals"]["dropped_max"] > 1e-3
    verified = streamer.verify_output(tmp_path / "out", tmp_path / "base", adapter, sample="all")
    assert verified["totals"]["not_compared"] == 0
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name][0, 0] += 0.1 * float(tensors[name].abs().max())
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "out", other)
    save_file(tensors, other / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(streamer.StreamerError):
        streamer.verify_output(other, tmp_path / "base", adapter, sample="all")


def test_other_outputs_advise_it_once(tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base")
    adapter = make_adapter(
        cls, tmp_path / "base", tmp_path / "adapter", ["q_proj", "o_proj"], **CASES["both"]
    )
    record = streamer.reduce_intruder_dimension(
        tmp_path / "base", adapter, tmp_path / "out", mitigation_lambda=1
    )
    (advice,) = record["advice"]
    assert advice.startswith("vLLM and other servers ignore rank_pattern and alpha_pattern and")
    assert "--for-server" in advice


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        (
            {"trainable_token_indices": [3, 5]},
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
        ),
    ],
)
@pytest.mark.parametrize("to_lora", [None, 8])
def test_what_servers_do_not_apply_is_told(
    tmp_path: Path, options: dict[str, Any], name: str, to_lora: int | None
) -> None:
    cls = make_base("llama", tmp_path / "base")
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", ["q_proj"], **options)
    record = serve(
        tmp_path / "base", adapter, tmp_path / "out", mitigation_lambda=1, to_lora=to_lora
    )
    (advice,) = record["advice"]
    assert (
        f"keeps 1 tensor beside the factors (first: 'base_model.model.{name}'), which vLLM and other"
        in advice
    )


@pytest.mark.parametrize(
    "how", [{"combination_type": "cat"}, {"combination_type": "svd", "svd_rank": 32}]
)
def test_peft_combines_them_as_their_deltas(tmp_path: Path, how: dict[str, Any]) -> None:
    """PEFT keeps rsLoRA's rule for factors that already have their scale."""
    cls = make_base("llama", tmp_path / "base")
    weights = {"rsLoRA": 0.7, "patterns": -0.3}
    for case in weights:
        adapter = make_adapter(
            cls, tmp_path / "base", tmp_path / case, ["q_proj", "o_proj"], r=4, **CASES[case]
        )
        serve(
            tmp_path / "base",
            adapter,
            tmp_path / f"served-{case}",
            mitigation_lambda=1,
            method="shrink",
        )
    model = PeftModel.from_pretrained(
        cls.from_pretrained(tmp_path / "base"), tmp_path / "rsLoRA", "rsLoRA"
    )
    model.load_adapter(tmp_path / "patterns", "patterns")
    for case in weights:
        model.load_adapter(tmp_path / f"served-{case}", f"served-{case}")
    model.add_weighted_adapter(
        [f"served-{case}" for case in weights], [*weights.values()], "both", **how
    )
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == 4
    for layer in layers:
        wanted = sum(weight * layer.get_delta_weight(case) for case, weight in weights.items())
        largest = float(wanted.abs().max())
        torch.testing.assert_close(
            layer.get_delta_weight("both"), wanted, rtol=0, atol=1e-5 * largest
        )


def test_resized_adapters_take_one_rank(tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base")
    adapter = make_adapter(
        cls, tmp_path / "base", tmp_path / "adapter", ["q_proj", "up_proj"], **PATTERNS
    )
    serve(tmp_path / "base", adapter, tmp_path / "share", mitigation_lambda=1, to_lora=0.99)
    config = json.loads((tmp_path / "share" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], "rank_pattern" in config) == (8, 8, False)
    serve(tmp_path / "base", adapter, tmp_path / "rank", mitigation_lambda=1, to_lora=12)
    config = json.loads((tmp_path / "rank" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], "rank_pattern" in config) == (12, 12, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "--to-lora RANK writes it as a LoRA adapter"),
        ({"lora_bias": True}, "biases beside its factors"),
        ({"r": 520}, "servers take ranks up to 512, found 520"),
    ],
)
def test_refuses_what_servers_cannot_apply(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    cls = make_base("qwen2", tmp_path / "base")
    make_adapter(cls, tmp_path / "base", tmp_path / "adapter", ["q_proj"], **options)
    with pytest.raises(UnsupportedError, match=message):
        serve(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", mitigation_lambda=1)

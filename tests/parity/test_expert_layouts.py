"""Two orders of lora_B's columns on stacked experts, PEFT's and Unsloth's: one dense delta of both, and refusals of what is left open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import MODELS
from commands import refuse_everywhere
from expert_models import EXPERTS, adapt, make
from forks import server
from peft import PeftModel
from safetensors.torch import load_file, save_file

import streamer
from streamer.adapters.stated import stated_options
from streamer.errors import UnsupportedError, UsageError

RANK, COUNT = 3, 4
NAMES = ["mixtral", "qwen3-moe"]
GROUPED = {"lora_B_layout": "grouped_by_expert"}
DETAILS = {"lora_A_layout": "grouped_by_expert", "parameters": {"gate_up_proj": {**GROUPED, "num_experts": COUNT}}}


def grouped(adapter: Path, home: Path, **config: Any) -> Path:
    """A copy of an adapter whose columns of lora_B stand expert by expert: column e·r + k is PEFT's k·E + e."""
    home.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    columns = [k * COUNT + e for e in range(COUNT) for k in range(RANK)]
    for name, tensor in tensors.items():
        if ".experts." in name and "lora_B" in name:
            tensors[name] = tensor[:, columns].contiguous()
    save_file(tensors, home / "adapter_model.safetensors", {"format": "pt"})
    return stated(adapter, home, **config)


def stated(adapter: Path, home: Path, **config: Any) -> Path:
    """Write an adapter's config with other values into a directory."""
    values = json.loads((adapter / "adapter_config.json").read_text())
    (home / "adapter_config.json").write_text(json.dumps({**values, **config}))
    return home


def dense(adapter: Path, layer: str, is_grouped: bool) -> np.ndarray:
    """Δ of one stack, (E, out, in), in float64 by the definition: alpha / r times the sum of each expert's outer products."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{layer}.{factor}.weight"].double().numpy() for factor in ("lora_A", "lora_B"))
    out = np.zeros((COUNT, len(B), A.shape[1]))
    for e in range(COUNT):
        for k in range(RANK):
            out[e] += 2 * np.outer(B[:, e * RANK + k if is_grouped else k * COUNT + e], A[e * RANK + k])
    return out


def merged(base: Path, adapter: Path, home: Path, **options: Any) -> Path:
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, home, mitigation_lambda=1.0, **options)
    return home


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model.eval()(torch.arange(2, 34)[None]).logits
    return answer


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_are_one_delta(name: str, tmp_path: Path) -> None:
    """Merged by streamer, and added in float64 to what transformers loads; the logits are those of PEFT's layers."""
    base, adapter, model = make(name, tmp_path, EXPERTS)
    theirs, cls = logits(model), type(model.get_base_model())
    unsloth = grouped(adapter, tmp_path / "grouped", **GROUPED, unsloth_fused_expert_lora=DETAILS)
    before = cls.from_pretrained(base).state_dict()
    for path, is_grouped in ((adapter, False), (unsloth, True)):
        loaded = cls.from_pretrained(merged(base, path, tmp_path / f"merged-{is_grouped}"))
        torch.testing.assert_close(logits(loaded), theirs, rtol=1e-4, atol=1e-4)
        for inner, parameter in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            stack = f"model.layers.1.mlp.experts.{parameter}"
            delta = torch.from_numpy(dense(path, f"model.layers.1.mlp.experts{inner}", is_grouped))
            torch.testing.assert_close(
                loaded.state_dict()[stack].double(), before[stack].double() + delta, rtol=1e-6, atol=1e-6
            )
    (tmp_path / "misread").mkdir()
    (tmp_path / "misread/adapter_model.safetensors").write_bytes((unsloth / "adapter_model.safetensors").read_bytes())
    misread = cls.from_pretrained(merged(base, stated(adapter, tmp_path / "misread"), tmp_path / "wrong"))
    assert (logits(misread) - theirs).abs().max() > 0.3 * theirs.abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"method": "project", "mitigation_lambda": 0.25, "top_k": 4, "threshold_epsilon": 0.9},
                                     {"method": "shrink", "mitigation_lambda": 0.5}, {"mitigation_lambda": 1.0}],
                         ids=lambda o: o.get("method", "unchanged"))  # fmt: skip
def test_a_mitigated_adapter_is_in_pefts_order(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base, adapter, model = make(name, tmp_path, EXPERTS)
    unsloth = grouped(adapter, tmp_path / "grouped", **GROUPED, unsloth_fused_expert_lora=DETAILS)
    mitigated = [tmp_path / "of PEFT", tmp_path / "of Unsloth"]
    for path, output in zip((adapter, unsloth), mitigated, strict=True):
        streamer.reduce_intruder_dimension(base, path, output, **options)
    config = json.loads((mitigated[1] / "adapter_config.json").read_text())
    assert config == json.loads((adapter / "adapter_config.json").read_text())
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in mitigated)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-5, atol=1e-6, msg=key)
    cls = type(model.get_base_model())
    loaded = cls.from_pretrained(merged(base, mitigated[1], tmp_path / "merged"))
    live = PeftModel.from_pretrained(cls.from_pretrained(base), mitigated[1])
    torch.testing.assert_close(logits(live), logits(loaded), rtol=1e-4, atol=1e-4)


def test_the_layout_is_asked_for(tmp_path: Path) -> None:
    base, adapter, _ = make("mixtral", tmp_path, EXPERTS)
    plain = grouped(adapter, tmp_path / "a", base_model_name_or_path="unsloth/mixtral")
    carded = grouped(adapter, tmp_path / "b")
    (carded / "README.md").write_text("---\ntags:\n- Unsloth\n---\n")
    marked = stated(adapter, grouped(adapter, tmp_path / "c"))
    tensors = load_file(marked / "adapter_model.safetensors")
    save_file(tensors, marked / "adapter_model.safetensors", {"trainer": "unsloth 2026.7"})
    places = ("'base_model_name_or_path' of adapter_config.json", "line 3 of README.md",
              "'trainer' of the metadata of adapter_model.safetensors")  # fmt: skip
    options = "pass --lora-b-layout grouped_by_expert if .*, else --lora-b-layout rank_major$"
    for path, where in zip((plain, carded, marked), places, strict=True):
        with pytest.raises(UnsupportedError, match=rf"and {where} names Unsloth, .*; {options}") as e:
            streamer.detect_intruder_dimensions(base, path)
        assert len(str(e.value).replace(str(path), "")) < 300
    wanted = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    for path in (plain, carded, marked):
        got = dict(streamer.iter_merged(base, path, mitigation_lambda=1.0, lora_b_layout="grouped_by_expert"))
        assert all(torch.allclose(got[key], tensor, rtol=1e-5, atol=1e-6) for key, tensor in wanted.items())
    # The option decides the findings, so they say it.
    findings = streamer.detect_intruder_dimensions(base, plain, lora_b_layout="grouped_by_expert")
    assert findings.adapter["lora_b_layout"] == "grouped_by_expert"
    assert stated_options(findings.adapter) == ["--lora-b-layout", "grouped_by_expert"]
    # What streamer writes of it is in PEFT's order, whatever its card and base are called.
    streamer.reduce_intruder_dimension(base, plain, tmp_path / "mitigated", method="shrink", mitigation_lambda=0.5,
                                       lora_b_layout="grouped_by_expert")  # fmt: skip
    half = dict(streamer.iter_merged(base, tmp_path / "mitigated", mitigation_lambda=1.0))
    before = dict(streamer.iter_merged(base, adapter, method="shrink", mitigation_lambda=0.5))
    assert all(torch.allclose(half[key], tensor, rtol=1e-5, atol=1e-6) for key, tensor in before.items())


def test_an_adapter_without_stacks_is_not_asked(tmp_path: Path) -> None:
    base, adapter, _ = make("mixtral", tmp_path, [])
    streamer.detect_intruder_dimensions(base, stated(adapter, adapter, base_model_name_or_path="unsloth/mixtral"))


@pytest.mark.parametrize(("rank", "count"), [(1, 4), (3, 1)], ids=["rank 1", "one expert"])
def test_layouts_that_coincide(rank: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, config, more = MODELS["mixtral"]
    few = {**config().to_dict(), "num_local_experts": count, "num_experts_per_tok": 1}
    monkeypatch.setitem(MODELS, "mixtral", (cls, lambda: type(config())(**few), more))
    base, adapter, model = make("mixtral", tmp_path, [])
    adapt(type(model.get_base_model()), tmp_path, EXPERTS, rank_pattern=dict.fromkeys(EXPERTS, rank))
    wanted = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    stated(adapter, adapter, base_model_name_or_path="unsloth/mixtral")
    got = dict(streamer.iter_merged(base, adapter, mitigation_lambda=1.0))
    assert all(torch.equal(got[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"lora_B_layout": "mixed"}, {}, "lora_B_layout is 'mixed', expected rank_major or grouped_by_expert"),
        ({"lora_B_layout": ["rank_major"]}, {}, "expected rank_major or grouped_by_expert"),
        ({"lora_B_layout": "rank_major", "unsloth_fused_expert_lora": DETAILS}, {},
         "lora_B_layout is grouped_by_expert, rank_major, expected"),
        ({"unsloth_fused_expert_lora": {"lora_A_layout": "rank_major"}}, {}, "lora_A_layout is rank_major, expected grouped_by_expert"),
        (GROUPED, {"lora_b_layout": "rank_major"}, "grouped_by_expert, and --lora-b-layout says rank_major; leave that option out"),
    ],
)  # fmt: skip
def test_layouts_that_are_refused(config: dict[str, Any], options: dict[str, Any], words: str, tmp_path: Path) -> None:
    base, adapter, _ = make("mixtral", tmp_path, EXPERTS)
    with pytest.raises(UnsupportedError, match=words.replace("[", r"\[")):
        streamer.iter_merged(base, stated(adapter, adapter, **config), **options)


def test_on_the_command_line(tmp_path: Path) -> None:
    base, adapter, _ = make("mixtral", tmp_path, EXPERTS)
    unsloth = grouped(adapter, tmp_path / "grouped", base_model_name_or_path="unsloth/mixtral")
    refuse_everywhere(base, unsloth, tmp_path, 3, "names Unsloth", "pass --lora-b-layout grouped_by_expert")
    outputs = {}
    for path, words in ((adapter, []), (unsloth, ["--lora-b-layout", "grouped_by_expert"])):
        output = tmp_path / f"merged-{path.name}"
        assert server().run("merge", base, path, "-o", output, "--lambda", 1, *words).code == 0
        outputs[path] = load_file(output / "model.safetensors")
    for key, tensor in outputs[adapter].items():
        torch.testing.assert_close(outputs[unsloth][key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    assert "--lora-b-layout grouped_by_expert" in (tmp_path / "merged-grouped/README.md").read_text()
    with pytest.raises(UsageError, match="lora_b_layout: expected rank_major or grouped_by_expert, found 'peft'"):
        streamer.iter_merged(base, unsloth, lora_b_layout="peft")  # type: ignore[arg-type]

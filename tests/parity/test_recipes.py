"""The recipes of docs/recipes.md, run as they stand on real models: each writes what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenized_texts
import torch
from causal_models import make_adapter, make_base
from command_line import ENV
from forks import Outcome, server
from paths import ROOT
from peft import PeftModel
from quantized import nf4
from safetensors.numpy import load_file
from seeds import vary
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

PAGE = (ROOT / "docs" / "recipes.md").read_text()
SCRIPTS = (ROOT / "docs" / "shell.md").read_text()
TARGETS = ["q_proj", "up_proj"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    """The directory in which all recipes have run, one after the other, and what each command printed."""
    home = tmp_path_factory.mktemp("recipes")
    cls = make_base("llama", home / "base")
    tokenized_texts.save(home / "base", "words")
    config = json.loads((home / "base" / "config.json").read_text())
    (home / "base" / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 256})
    )
    (home / "general.txt").write_text(tokenized_texts.prose(4000))
    nf4(home / "base-nf4", home / "base")
    tokenized_texts.save(home / "base-nf4", "words")
    make_adapter(cls, home / "base", home / "adapter", TARGETS, r=8)
    make_adapter(cls, home / "base", home / "dora", TARGETS, use_dora=True)
    make_adapter(cls, home / "base", home / "saved", TARGETS, r=8, modules_to_save=["lm_head"])
    tuned = cls.from_pretrained(home / "base")
    torch.manual_seed(vary(3))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if any(target in name for target in (*TARGETS, "input_layernorm")):
                parameter.add_(0.05 * torch.randn_like(parameter))
    tuned.save_pretrained(home / "tuned")
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) >= 10
    return home, {
        line: server().run(*line.split()[1:], before=f"import os; os.chdir({str(home)!r})")
        for line in lines
    }


def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        return model(ids).logits


def deltas(adapter: Path) -> dict[str, np.ndarray]:
    """Each module's s·B·A in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    stems = [n.removesuffix(".lora_A.weight") for n in tensors if "lora_A" in n]
    factors = {
        stem: [tensors[f"{stem}.lora_{x}.weight"].astype(float) for x in "BA"] for stem in stems
    }
    return {
        stem.removeprefix("base_model.model."): scale * B @ A for stem, (B, A) in factors.items()
    }


def nearest(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(matrix)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def test_every_command_ends_well(ran: tuple[Path, dict[str, Outcome]]) -> None:
    assert {line: done.err for line, done in ran[1].items() if done.code} == {}


def test_inspect_says_which_base_it_is(ran: tuple[Path, dict[str, Outcome]]) -> None:
    plain = ran[1]["streamer inspect base adapter"]
    quantized = ran[1]["streamer inspect base-nf4 adapter"]
    assert "NF4" not in plain.out
    assert "NF4" in quantized.out


def test_a_merge_in_float32_says_nothing_of_rounding(ran: tuple[Path, dict[str, Outcome]]) -> None:
    assert "rounding" not in ran[1]["streamer merge base adapter --lambda 1 -o merged"].out


def test_a_resized_adapter_is_the_nearest_of_its_rank(ran: tuple[Path, dict[str, Outcome]]) -> None:
    before = deltas(ran[0] / "adapter")
    after = deltas(ran[0] / "resized")
    assert before.keys() == after.keys()
    assert json.loads((ran[0] / "resized" / "adapter_config.json").read_text())["r"] == 4
    for name, delta in before.items():
        np.testing.assert_allclose(
            after[name], nearest(delta, 4), atol=1e-5 * np.linalg.norm(delta)
        )


def test_a_share_of_the_energy_says_what_may_be_lost(ran: tuple[Path, dict[str, Outcome]]) -> None:
    resized, smaller = (
        json.loads((ran[0] / name / "streamer.json").read_text()) for name in ("resized", "smaller")
    )
    assert 0.01 < smaller["totals"]["dropped_max"] <= 0.05**0.5
    assert smaller["warnings"] == []
    assert [line.partition(":")[0] for line in resized["warnings"]] == ["lost in projection"]


def test_an_extracted_adapter_is_the_nearest_to_what_fine_tuning_changed(
    ran: tuple[Path, dict[str, Outcome]],
) -> None:
    home = ran[0]
    base, tuned = (load_file(home / name / "model.safetensors") for name in ("base", "tuned"))
    after = deltas(home / "extracted")
    assert {name.rpartition(".")[2] for name in after} == {*TARGETS}
    for name, delta in after.items():
        change = tuned[f"{name}.weight"].astype(float) - base[f"{name}.weight"].astype(float)
        np.testing.assert_allclose(delta, nearest(change, 16), atol=1e-4 * np.linalg.norm(change))
    config = json.loads((home / "extracted" / "adapter_config.json").read_text())
    assert all("input_layernorm" in name for name in config["modules_to_save"])
    record = json.loads((home / "extracted" / "streamer.json").read_text())
    norms = [f"model.layers.{i}.input_layernorm.weight" for i in range(len(record["carried"]))]
    assert norms
    assert [c["tensor"] for c in record["carried"]] == norms  # and no norm that is the base's


def test_a_server_s_adapters_are_plain_and_answer_as_the_given_ones(
    ran: tuple[Path, dict[str, Outcome]],
) -> None:
    home = ran[0]
    for name in ("plain", "served-adapter"):
        config = json.loads((home / name / "adapter_config.json").read_text())
        assert not any(config.get(key) for key in ("use_dora", "modules_to_save")), name
    served = logits(home / "served-base", home / "served-adapter")
    given = logits(home / "base", home / "saved")
    torch.testing.assert_close(served, given, rtol=1e-3, atol=1e-3)
    record = json.loads((home / "plain" / "streamer.json").read_text())
    assert (record["totals"]["dropped_max"] > 0.01) == bool(record["warnings"])


@pytest.mark.long
@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_a_script_acts_on_what_is_lost(
    ran: tuple[Path, dict[str, Outcome]], tmp_path: Path
) -> None:
    (script,) = re.findall(r"  ```sh\n(  streamer mitigate .*?)  ```", SCRIPTS, re.DOTALL)
    home = ran[0]
    script = script.replace("BASE ADAPTER", f"{home / 'base'} {home / 'adapter'}").replace(
        "streamer mitigate", '"$PY" -m streamer mitigate'
    )
    inputs = f'"$PY" -m streamer detect {home / "base"} {home / "adapter"} -o findings.safetensors -q --epsilon 0.9\n'
    done = subprocess.run(
        ["bash", "-ec", inputs + script],
        cwd=tmp_path,
        env={**os.environ, **ENV, "PY": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "warning: lost in projection" in done.stderr
    record = json.loads((tmp_path / "mitigated" / "streamer.json").read_text())
    assert (record["method"], record["warnings"]) == ("project", [])

"""Kinds of adapters that PEFT saves and that are refused, each in one line and by its name; what PEFT merges and writes is known."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from commands import refuse, refuse_everywhere
from forks import server
from safetensors.torch import save_file
from seeds import vary
from transformers import LlamaConfig, LlamaForCausalLM

from streamer.adapters.adapter_config import AdapterConfig, unknown_keys

# Kinds of adapters ----------------------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(vary(0))
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "base"
    llama().save_pretrained(path)
    return path


def lora(**config: object) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": ["q_proj"], "r": 4, **config})


REFUSED = {
    "layer_replication": (lambda: lora(layer_replication=[[0, 2], [1, 2]]), "layer replication: its change of the weights"),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), "its delta is relative to a residual of the base"),
    "OLoRA": (lambda: lora(init_lora_weights="olora"), "path_initial_model_for_weight_conversion"),
    "aLoRA": (
        lambda: lora(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
        "aLoRA: its change of the weights is not known here",
    ),
    "QALoRA": (lambda: lora(use_qalora=True), "QALoRA: its change of the weights is not known here"),
    "BD-LoRA": (
        lambda: lora(use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)),
        "BD-LoRA: its change of the weights is not known here",
    ),
    "KaSA": (lambda: lora(kasa_config=peft.KasaConfig()), "KaSA: its change of the weights is not known here"),
    "MonteCLoRA": (lambda: lora(monteclora_config=peft.MontecloraConfig()), "MonteCLoRA: its change of the weights is not known here"),
    "VeLoRA": (lambda: lora(velora_config=peft.VeloraConfig()), "VeLoRA: its change of the weights is not known here"),
    "VeRA without its projections": (
        lambda: peft.VeraConfig(target_modules=["q_proj"], save_projection=False),
        "VeRA: its projections are not in the file",
    ),
    "C3A": (lambda: peft.C3AConfig(block_size=8, target_modules=["q_proj"]), "C3A adapter: its change of the weights is not known here"),
    "MiSS mini": (
        lambda: peft.MissConfig(r=4, mini_r=4, target_modules=["q_proj"], init_weights="mini"),
        "MiSS mini: its block, repeated along the output, would fit other bases too",
    ),
    "IA3": (lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3 adapter"),
    "prompt": (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING adapter"),
}  # fmt: skip


def save_peft(config: peft.PeftConfig, path: Path) -> Path:
    """Save an adapter as PEFT saves it, its lora_B not zero."""
    with warnings.catch_warnings(action="ignore"):  # PEFT's advice on kinds that are refused anyway
        model = peft.get_peft_model(llama(), config)
        torch.manual_seed(vary(1))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_is_refused(llama_base: Path, tmp_path: Path, kind: str) -> None:
    config, words = REFUSED[kind]
    with warnings.catch_warnings(action="ignore"):
        made = config()
    adapter = save_peft(made, tmp_path / "adapter")
    refuse_everywhere(
        llama_base,
        adapter,
        tmp_path,
        3,
        f"{adapter}/adapter_",
        "refused: ",
        words,
        "; merge it with PEFT if it can, else use it unmerged",
    )


def test_an_arrow_router_is_refused(llama_base: Path, tmp_path: Path) -> None:
    """It needs the adapters that it routes between."""
    save_peft(lora(), tmp_path / "one")
    with warnings.catch_warnings(action="ignore"):
        model = peft.create_arrow_model(
            llama(),
            task_specific_adapter_paths=[str(tmp_path / "one")],
            arrow_config=peft.ArrowConfig(top_k=1),
        )
        model.save_pretrained(tmp_path / "saved", selected_adapters=["arrow_router"])
    refuse_everywhere(
        llama_base,
        tmp_path / "saved" / "arrow_router",
        tmp_path,
        3,
        "refused: ",
        "Arrow: its change of the weights is not known here",
    )


def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3, groups=2))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    with warnings.catch_warnings(action="ignore"):  # PEFT knows no config of such a model
        peft.get_peft_model(model, lora(target_modules=["0"])).save_pretrained(tmp_path / "adapter")
    words = "do not multiply to the delta of a layer (of one group, if it is a convolution)"
    refuse_everywhere(tmp_path / "base", tmp_path / "adapter", tmp_path, 3, words)


def test_what_dora_and_other_methods_cannot_write(llama_base: Path, tmp_path: Path) -> None:
    for name, config in {
        "DoRA": lora(use_dora=True),
        "LoHa": peft.LoHaConfig(target_modules=["q_proj"]),
    }.items():
        adapter = save_peft(config, tmp_path / name)
        line = refuse("mitigate", llama_base, adapter, tmp_path, 3, "--method", "shrink")
        assert (
            "the mitigated delta of 'model.layers.0.self_attn.q_proj' (and 1 more) has no form in this kind of adapter"
            in line
        )
        assert "`streamer merge` writes it into the base" in line
        assert (
            server()
            .run("mitigate", llama_base, adapter, "-o", tmp_path / f"same-{name}", "--lambda", "1")
            .code
            == 0
        )


def test_peft_is_no_way_out_of_a_key_that_it_drops(llama_base: Path, tmp_path: Path) -> None:
    """It merges the adapter as if the key were not there, which is what the refusal prevents."""
    adapter = save_peft(lora(), tmp_path / "adapter")
    plain = merged(llama_base, adapter)
    config = adapter / "adapter_config.json"
    tree = json.loads(config.read_text())
    for key, value, end in (
        (
            "use_hyper",
            True,
            "(True), which may change the delta; pass --ignore-key KEY if KEY does not\n",
        ),
        ("lora_B_layout", "mixed", "expected rank_major or grouped_by_expert for all experts\n"),
    ):
        config.write_text(json.dumps(tree | {key: value}))
        again = merged(llama_base, adapter)
        assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())
        for command in ("detect", "mitigate", "merge"):
            assert refuse(command, llama_base, adapter, tmp_path, 3).endswith(end)


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What PEFT merges."""
    with warnings.catch_warnings(action="ignore"):  # PEFT warns of keys that it drops
        model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload().state_dict()


def test_all_reasons_are_told_at_once(llama_base: Path, tmp_path: Path) -> None:
    config = lora(use_qalora=True, init_lora_weights="gaussian")
    adapter = save_peft(config, tmp_path / "adapter")
    tree = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(tree | {"use_hyper": True, "init_lora_weights": "magic"})
    )
    refuse_everywhere(
        llama_base,
        adapter,
        tmp_path,
        3,
        "QALoRA",
        "unknown initialisation",
        "unknown key 'use_hyper' (True), which may change the delta; pass --ignore-key KEY",
    )


METHODS = {"LORA": peft.LoraConfig, "LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig, "ADALORA": peft.AdaLoraConfig,
           "VERA": peft.VeraConfig, "OFT": peft.OFTConfig, "BOFT": peft.BOFTConfig,
           "MISS": peft.MissConfig, "SHIRA": peft.ShiraConfig, "DELORA": peft.DeloraConfig, "HRA": peft.HRAConfig}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_installed_peft_writes_no_unknown_key(method: str) -> None:
    """As it writes each config by default; and of LoRA, every field of it."""
    config = METHODS[method](**({"total_step": 9} if method == "ADALORA" else {}))
    values = json.loads(
        json.dumps({**config.to_dict(), "peft_version": peft.__version__}, default=list)
    )
    assert unknown_keys(AdapterConfig(values, Path())) == []
    if (
        method != "ADALORA"
    ):  # its class inherits fields of LoRA's, which PEFT refuses or ignores for it
        assert (
            unknown_keys(AdapterConfig({**dict.fromkeys(values, 1), "peft_type": method}, Path()))
            == []
        )

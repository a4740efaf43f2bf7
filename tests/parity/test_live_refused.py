"""Live PEFT models that are refused before anything changes: those that PEFT cannot save, or that are nested."""

from __future__ import annotations

import peft
import pytest
import torch
from kinds import llama_config
from seeds import vary
from transformers import LlamaForCausalLM

import streamer.peft as live
from streamer.errors import UnsupportedError


def model() -> LlamaForCausalLM:
    torch.manual_seed(vary(0))
    return LlamaForCausalLM(llama_config())


def lora(target: str, **options: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False, **options)


def test_an_adapter_beside_one_with_trained_tokens() -> None:
    """PEFT looks for tokens of every adapter."""
    both = peft.get_peft_model(model(), lora("q_proj", trainable_token_indices=[1, 5]), adapter_name="tokens")
    both.add_adapter("plain", lora("q_proj"))
    before = {name: t.clone() for name, t in both.state_dict().items()}
    with pytest.raises(UnsupportedError, match="adapter 'plain': PEFT cannot save it"):
        live.detect_intruder_dimensions(both, adapter_name="plain")
    assert all(torch.equal(t, before[name]) for name, t in both.state_dict().items())


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT", "ignore:Already found a `peft_config`")
def test_a_peft_model_in_another() -> None:
    inner = peft.get_peft_model(model(), lora("q_proj"))
    outer = peft.PeftModel(inner, lora("v_proj"))
    names = [name for name, _ in outer.named_modules()]
    with pytest.raises(UnsupportedError, match="a PeftModel around a PeftModel"):
        live.merge_and_unload_with_reduced_intruder_dimensions(outer)
    assert [name for name, _ in outer.named_modules()] == names

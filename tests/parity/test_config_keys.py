"""The keys that the installed PEFT writes into an adapter's config are known."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest

from streamer.adapters.adapter_config import AdapterConfig
from streamer.adapters.config_rules import unknown_keys

METHODS = {"LORA": peft.LoraConfig, "LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig, "ADALORA": peft.AdaLoraConfig,
           "VERA": peft.VeraConfig, "OFT": peft.OFTConfig, "BOFT": peft.BOFTConfig}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_installed_peft_writes_no_unknown_key(method: str) -> None:
    """As it writes each config by default; and of LoRA, every field of it."""
    config = METHODS[method](**({"total_step": 9} if method == "ADALORA" else {}))
    values = json.loads(json.dumps({**config.to_dict(), "peft_version": peft.__version__}, default=list))
    assert unknown_keys(AdapterConfig(values, Path())) == []
    if method != "ADALORA":  # its class inherits fields of LoRA's, which PEFT refuses or ignores for it
        assert unknown_keys(AdapterConfig({**dict.fromkeys(values, 1), "peft_type": method}, Path())) == []

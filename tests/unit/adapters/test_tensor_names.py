"""Names of an adapter's tensors: variants, what is carried along, forms of factors, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from raw_adapter import MODULE, factors, write_raw

from streamer.adapters.adapter import open_adapter
from streamer.errors import FormatError, MismatchError, UnsupportedError

# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "base_model.model.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.default.weight",
        "base_model.model.{}.lora_{}.my-adapter_2.weight",
        "{}.lora_{}.weight",
        "module.base_model.model.{}.lora_{}.weight",
        "_orig_mod.base_model.model.{}.lora_{}.weight",
        "base_model.model._orig_mod.{}.lora_{}.weight",
        "_fsdp_wrapped_module.base_model.model.{}.lora_{}.weight",
        "module._orig_mod.base_model.model.{}.lora_{}.default.weight",
        "_fsdp_wrapped_module._orig_mod.base_model.model.{}.lora_{}.weight",
        "base_model.model.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.q_proj.lora_{1}.weight",
    ],
)
def test_name_variants(tmp_path: Path, template: str) -> None:
    A, B = factors()
    adapter = open_adapter(
        write_raw(tmp_path, {template.format(MODULE, "A"): A, template.format(MODULE, "B"): B})
    )
    assert list(adapter.modules) == [MODULE]
    module = adapter.modules[MODULE]
    assert (module.a, module.b) == (template.format(MODULE, "A"), template.format(MODULE, "B"))
    delta = module.delta(adapter.tensors, None)
    torch.testing.assert_close(delta.L @ delta.R.T, 2.0 * B @ A)


@pytest.mark.parametrize(
    "name", ["base_model.model.{}.hada_w1_a", "base_model.model.{}.lora_E", "prompt_embeddings"]
)
def test_a_tensor_that_would_be_lost_is_refused(tmp_path: Path, name: str) -> None:
    name = name.format(MODULE)
    A, B = factors()
    path = write_raw(
        tmp_path,
        {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B, name: torch.zeros(4, 1)},
    )
    with pytest.raises(UnsupportedError) as e:
        open_adapter(path)
    assert str(e.value) == (
        f"{path / 'adapter_model.safetensors'}: refused: {name!r} of another method or of unknown meaning; "
        "merge it with PEFT if it can, else use it unmerged"
    )


@pytest.mark.parametrize(
    ("name", "role", "of"),
    [
        ("base_model.model.{}.lora_B.bias", "lora_bias", f"{MODULE}.bias"),
        ("base_model.model.{}.lora_B.default.bias", "lora_bias", f"{MODULE}.bias"),
        ("base_model.model.{}.bias", "saved", f"{MODULE}.bias"),
        ("base_model.model.{}.base_layer.bias", "saved", f"{MODULE}.bias"),
        ("base_model.model.lm_head.weight", "saved", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "saved", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.weight", "saved", "lm_head.weight"),
        (
            "base_model.model.head.modules_to_save.default.0.dense.weight",
            "saved",
            "head.0.dense.weight",
        ),
        ("base_model.model.lm_head.original_module.weight", "original", None),
        ("base_model.model.{}.base_layer.weight", "saved", f"{MODULE}.weight"),
        ("base_model.model.embed.token_adapter.base_layer.weight", "saved", "embed.weight"),
        (
            "base_model.model.embed.token_adapter.trainable_tokens_original.default",
            "original",
            None,
        ),
        ("base_model.model.embed.token_adapter.trainable_tokens_delta", "tokens", "embed.weight"),
        (
            "base_model.model.embed.token_adapter.trainable_tokens_delta.default",
            "tokens",
            "embed.weight",
        ),
    ],
)
def test_what_is_carried_along(tmp_path: Path, name: str, role: str, of: str | None) -> None:
    A, B = factors()
    name = name.format(MODULE)
    path = write_raw(
        tmp_path,
        {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B, name: torch.zeros(2, 5)},
        trainable_token_indices=[4, 1],
        lora_bias=role == "lora_bias",
    )
    (carried,) = open_adapter(path).carried
    assert (carried.role, carried.source) == (role, name)
    if of is not None:
        assert carried.name == of
    assert carried.scaling == (2.0 if role == "lora_bias" else 1.0)
    assert carried.indices == ((4, 1) if role == "tokens" else ())


@pytest.mark.parametrize(
    ("names", "a", "b", "shape", "layer_kind", "weight"),
    [
        (("lora_A.weight", "lora_B.weight"), (4, 5), (6, 4), (6, 5), "linear", (6, 5)),
        (("lora_embedding_A", "lora_embedding_B"), (4, 50), (6, 4), (6, 50), "embedding", (50, 6)),
        (
            ("lora_embedding_A.default", "lora_embedding_B.default"),
            (4, 50),
            (6, 4),
            (6, 50),
            "embedding",
            (50, 6),
        ),
        (
            ("lora_A.weight", "lora_B.weight"),
            (4, 5, 3),
            (6, 4, 1),
            (6, 15),
            "convolution",
            (6, 5, 3),
        ),
        (
            ("lora_A.weight", "lora_B.weight"),
            (4, 5, 3, 2),
            (6, 4, 1, 1),
            (6, 30),
            "convolution",
            (6, 5, 3, 2),
        ),
        (
            ("lora_A.weight", "lora_B.weight"),
            (4, 5, 1, 1, 2),
            (6, 4, 1, 1, 1),
            (6, 10),
            "convolution",
            (6, 5, 1, 1, 2),
        ),
    ],
)
def test_forms(
    tmp_path: Path,
    names: tuple[str, str],
    a: tuple,
    b: tuple,
    shape: tuple,
    layer_kind: str,
    weight: tuple,
) -> None:
    A = torch.randn(a)
    B = torch.randn(b)
    adapter = open_adapter(write_raw(tmp_path, {f"x.{names[0]}": A, f"x.{names[1]}": B}))
    module = adapter.modules["x"]
    assert (module.shape, module.layer_kind, module.weight, module.rank) == (
        shape,
        layer_kind,
        weight,
        4,
    )
    torch.testing.assert_close(
        module.delta(adapter.tensors, None).dense(), 2 * B.flatten(1) @ A.flatten(1)
    )


@pytest.mark.parametrize(
    "tensors",
    [
        {"lora_A.weight": (4, 5, 3), "lora_B.weight": (6, 2, 1)},  # on a convolution with 2 groups
        {"lora_A.weight": (4, 5, 3), "lora_B.weight": (6, 4, 3)},
        {"lora_A.weight": (4, 5, 3), "lora_B.weight": (6, 4)},
        {"lora_embedding_A": (4, 5), "lora_B.weight": (6, 4)},
        {"lora_embedding_A": (4, 5, 3), "lora_embedding_B": (6, 4, 1)},
        {"lora_A.weight": (4,), "lora_B.weight": (6,)},
        {"lora_A.weight": (), "lora_B.weight": ()},
        {"lora_A.weight": (4, 5), "lora_B.weight": (6, 3)},
        {"lora_A.weight": (0, 5), "lora_B.weight": (6, 0)},
        {"lora_A.weight": (4, 0), "lora_B.weight": (6, 4)},
    ],
)
def test_factors_of_no_form(tmp_path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    path = write_raw(tmp_path, {f"x.{n}": torch.ones(s) for n, s in tensors.items()})
    B, A = (list(tensors[name]) for name in reversed(tensors))
    with pytest.raises(
        FormatError, match=re.escape(f"module 'x': lora_B {B} and lora_A {A} do not multiply to")
    ):
        open_adapter(path)


def test_a_bias_that_the_config_does_not_announce(tmp_path: Path) -> None:
    """PEFT would ignore it."""
    A, B = factors()
    path = write_raw(
        tmp_path,
        {
            f"{MODULE}.lora_A.weight": A,
            f"{MODULE}.lora_B.weight": B,
            f"{MODULE}.lora_B.bias": torch.zeros(5),
        },
    )
    with pytest.raises(
        MismatchError,
        match=r"lora_bias is None, but the file has '.*lora_B.bias'; set lora_bias to true",
    ):
        open_adapter(path)

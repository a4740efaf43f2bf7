"""Where a module is found: exact names, renames, one exchange of prefixes; everything else is no match."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.plan.name_matching import Match
from streamer.plan.name_matching import match_names as match
from streamer.plan.names import NameIndex, Rename, Renames, renames_for
from streamer.weights.model_config import ModelConfig


def match_names(
    modules: list[str], tensors: list[str], model: dict[str, object] | Renames | None = None
) -> dict[str, Match]:
    renames = model if isinstance(model, Renames) else renames_for(ModelConfig(model or {}))
    return match(modules, NameIndex(tuple(tensors), renames))


def weights(*stems: str) -> list[str]:
    return [f"{stem}.weight" for stem in stems]


LAYERS = [
    f"layers.{i}.{part}" for i in range(12) for part in ("attn.q_proj", "attn.k_proj", "mlp.up")
]


def prefixed(prefix: str) -> list[str]:
    return [prefix + name for name in LAYERS]


@pytest.mark.parametrize(
    ("mine", "theirs", "why"),
    [
        ("model.", "model.", "exact"),
        ("", "", "exact"),
        ("", "model.", "prefix '' → 'model.'"),
        ("model.", "", "prefix 'model.' → ''"),
        ("model.", "model.model.", "prefix '' → 'model.'"),
        ("model.model.", "model.", "prefix 'model.' → ''"),
        ("model.", "transformer.h.", "prefix 'model.' → 'transformer.h.'"),
        ("model.language_model.", "language_model.model.", "rename"),
        ("language_model.model.", "model.language_model.", "rename"),
        ("model.visual.", "visual.", "rename"),
        ("vision_tower.", "model.vision_tower.", "rename"),
    ],
)
def test_one_change_of_prefix_matches_every_module(mine: str, theirs: str, why: str) -> None:
    found = match_names(prefixed(mine), weights(*prefixed(theirs)))
    assert {n: m[:2] for n, m in found.items()} == {
        mine + name: (f"{theirs}{name}.weight", why) for name in LAYERS
    }


def test_an_exact_name_wins_over_a_longer_one() -> None:
    modules = prefixed("model.")
    found = match_names(modules, weights(*prefixed("model."), *prefixed("draft.model.")))
    assert {n: m[:2] for n, m in found.items()} == {
        name: (f"{name}.weight", "exact") for name in modules
    }


def test_an_ambiguous_prefix_lists_the_places() -> None:
    found = match_names(prefixed("model."), weights(*prefixed("encoder."), *prefixed("decoder.")))
    for name, (tensor, rule, why, _) in found.items():
        tail = name.removeprefix("model.")
        assert (tensor, rule) == ("", "")
        assert why == f"is ambiguous: it could be 'decoder.{tail}.weight', 'encoder.{tail}.weight'"


def test_one_prefix_must_fit_every_module() -> None:
    """Two modules that would each fit under a prefix of their own do not fit."""
    found = match_names(["a.attn.q", "a.mlp.up"], weights("b.attn.q", "c.mlp.up"))
    assert {m.tensor for m in found.values()} == {""}
    assert (
        "has no tensor in the base (looked for 'a.attn.q.weight' and for one exchange of prefixes)"
        in found["a.attn.q"].why
    )


def test_layers_are_never_exchanged() -> None:
    for mine, theirs in [
        ("layers.0.q", "layers.1.q"),
        ("model.layers.0.q", "model.layers.10.q"),
        ("h.0.q", "layers.1.q"),
        ("0.q", "1.q"),
        ("model.0.q", "model.q"),
        ("q", "layers.0.q"),
        ("layers.0.q", "q"),
    ]:
        found = match_names([mine], weights(theirs))
        assert found[mine].tensor == "", (mine, theirs)
    found = match_names(
        prefixed("model."), weights(*(n.replace("layers.", "layers.1") for n in prefixed("model.")))
    )
    for name, (tensor, rule, why, _) in found.items():
        assert (
            (tensor, rule) == (f"{name}.weight", "exact")
            if "layers.10." in name or "layers.11." in name
            else "has no tensor in the base" in why
        )


@given(st.data())
def test_a_match_keeps_the_path_and_its_numbers(data: st.DataObject) -> None:
    """Whatever the names: a found tensor has the module's last component and its numbers, and no two modules share one."""
    path = st.lists(
        st.sampled_from(["a", "b", "model", "0", "1", "q"]), min_size=1, max_size=5
    ).map(".".join)
    modules = data.draw(st.lists(path, min_size=1, max_size=4, unique=True))
    tensors = data.draw(st.lists(path, min_size=1, max_size=6, unique=True))
    found = match_names(modules, weights(*tensors))
    assert list(found).sort() == modules.sort()
    for name, (tensor, _, why, _) in found.items():
        if not tensor:
            assert why
            continue
        stem = tensor.removesuffix(".weight")
        assert stem in tensors
        assert stem.split(".")[-1] == name.split(".")[-1]
        assert [p for p in stem.split(".") if p.isdigit()] == [
            p for p in name.split(".") if p.isdigit()
        ]
    if all(m.tensor for m in found.values()):
        assert len({m.tensor for m in found.values()}) == len(modules)


def test_a_multihead_attention_is_named() -> None:
    """PEFT's LoRA on one is on a parameter of its own name, and on a layer below a wrapper: neither is on disk."""
    tensors = ["model.q.weight", "head.attention.in_proj_weight", "head.attention.out_proj.weight"]
    found = match_names(
        ["model.q", "head.attention", "head.attention.base_layer.out_proj"], tensors
    )
    for name in ("head.attention", "head.attention.base_layer.out_proj"):
        assert found[name].why.startswith(f"has no tensor in the base (looked for '{name}.weight'")


def test_a_prefix_is_not_exchanged_without_a_layer_number() -> None:
    """One shared last name is no evidence: a classifier is not the pooler."""
    found = match_names(["classifier.dense"], ["pooler.dense.weight", "encoder.layer.0.q.weight"])
    assert found["classifier.dense"].tensor == ""
    assert "has no tensor in the base" in found["classifier.dense"].why


# What transformers loads under another name, or builds ----------------------------------------------------------------

KIMI = {"model_type": "kimi_k25"}
BLOCK = "vision_tower.encoder.blocks.0.mlp."
LAYER = "model.vision_tower.layers.0.mlp."


def test_a_name_that_means_one_tensor_on_disk_and_another_in_the_loaded_model() -> None:
    """transformers loads fc0 as fc1, and fc1 as fc2: which naming an adapter has, all of its modules together say."""
    tensors = weights(BLOCK + "fc0", BLOCK + "fc1")
    loaded = match_names([LAYER + "fc1", LAYER + "fc2"], tensors, KIMI)
    assert [m[:2] for m in loaded.values()] == [
        (BLOCK + "fc0.weight", "rename"),
        (BLOCK + "fc1.weight", "rename"),
    ]
    stored = match_names([BLOCK + "fc0", BLOCK + "fc1"], tensors, KIMI)
    assert [m[:2] for m in stored.values()] == [
        (BLOCK + "fc0.weight", "exact"),
        (BLOCK + "fc1.weight", "exact"),
    ]


def test_where_it_stays_open_the_places_are_listed() -> None:
    """On disk ``next`` is one tensor, in the loaded model another, and the other modules do not tell which naming this is."""
    swap = Renames(
        "swap", (Rename(((re.compile("first"), "next"), (re.compile("next"), "last"))),), ()
    )
    tensors = weights("layers.0.first", "layers.0.next", "layers.0.q")
    (match,) = match_names(["layers.0.next"], tensors, swap).values()
    assert match.tensor == ""
    assert match.why == "is ambiguous: it could be 'layers.0.next.weight', 'layers.0.first.weight'"
    for other, (tensor, rule) in {
        "first": ("layers.0.next.weight", "exact"),
        "last": ("layers.0.first.weight", "rename"),
    }.items():
        assert match_names(["layers.0.next", f"layers.0.{other}"], tensors, swap)["layers.0.next"][
            :2
        ] == (tensor, rule)


def test_what_a_loader_builds_has_no_tensor_of_its_own() -> None:
    tensors = weights(
        *(
            f"model.layers.0.mlp.experts.{e}.{part}_proj"
            for e in range(4)
            for part in ("gate", "up", "down")
        )
    )
    found = match_names(
        ["model.layers.0.mlp.experts.gate_up_proj"], tensors, {"model_type": "qwen3_moe"}
    )
    (match,) = found.values()
    assert match.tensor == ""
    assert match.why.startswith("has no tensor in the base (looked for ")


def test_a_fused_tensor_is_found_by_its_name_on_disk_alone() -> None:
    """Where a loader splits a tensor, its first part is not the whole."""
    config = {"model_type": "hrm_text"}
    tensors = weights("model.layers.0.mlp.gate_up_proj")
    assert (
        match_names(["model.layers.0.mlp.gate_up_proj"], tensors, config).popitem()[1].rule
        == "exact"
    )
    (match,) = match_names(["model.layers.0.mlp.gate_proj"], tensors, config).values()
    assert match.tensor == ""


def test_nested_models_bring_their_renames() -> None:
    """A LLaVA-like model: the tower's own renames act below the tower only."""
    config = {
        "model_type": "llava",
        "vision_config": {"model_type": "clip_vision_model"},
        "text_config": {"model_type": "llama"},
    }
    tensors = weights(
        "vision_tower.vision_model.encoder.layers.0.q_proj", "language_model.model.layers.0.q_proj"
    )
    modules = ["model.vision_tower.encoder.layers.0.q_proj", "model.language_model.layers.0.q_proj"]
    found = match_names(modules, tensors, config)
    assert [m.tensor for m in found.values()] == tensors
    assert found[modules[0]].why == (
        "transformers loads 'vision_tower.vision_model.encoder.layers.0.q_proj.weight' as "
        "'model.vision_tower.encoder.layers.0.q_proj.weight', or did, in llava"
    )


@pytest.mark.parametrize(
    "config",
    [{"model_type": 3}, {"architectures": "x"}, {"architectures": [None]}, {"text_config": [1]}],
)
def test_a_strange_config_is_no_model_that_is_known(config: dict[str, object]) -> None:
    assert match_names(["model.q"], weights("model.q"), config)["model.q"].rule == "exact"

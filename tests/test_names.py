"""Where a module is found: exact names, renames, one exchange of prefixes; everything else is no match."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamer.names import match_names


def weights(*stems: str) -> list[str]:
    return [f"{stem}.weight" for stem in stems]


LAYERS = [f"layers.{i}.{part}" for i in range(12) for part in ("attn.q_proj", "attn.k_proj", "mlp.up")]


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
def test_prefixes(mine: str, theirs: str, why: str) -> None:
    found = match_names(prefixed(mine), weights(*prefixed(theirs)))
    assert {n: m[:2] for n, m in found.items()} == {mine + name: (f"{theirs}{name}.weight", why) for name in LAYERS}


def test_language_and_vision_together() -> None:
    modules = ["model.language_model.layers.0.q", "model.visual.blocks.0.q"]
    tensors = weights("language_model.model.layers.0.q", "visual.blocks.0.q")
    assert [m.tensor for m in match_names(modules, tensors).values()] == tensors


def test_an_exact_name_wins_over_a_longer_one() -> None:
    modules = prefixed("model.")
    found = match_names(modules, weights(*prefixed("model."), *prefixed("draft.model.")))
    assert {n: m[:2] for n, m in found.items()} == {name: (f"{name}.weight", "exact") for name in modules}


def test_an_ambiguous_prefix_lists_the_places() -> None:
    found = match_names(prefixed("model."), weights(*prefixed("encoder."), *prefixed("decoder.")))
    for name, (tensor, rule, why) in found.items():
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
    for mine, theirs in [("layers.0.q", "layers.1.q"), ("model.layers.0.q", "model.layers.10.q"), ("h.0.q", "layers.1.q"),
                         ("0.q", "1.q"), ("model.0.q", "model.q"), ("q", "layers.0.q"), ("layers.0.q", "q")]:  # fmt: skip
        found = match_names([mine], weights(theirs))
        assert found[mine].tensor == "", (mine, theirs)
    found = match_names(prefixed("model."), weights(*(n.replace("layers.", "layers.1") for n in prefixed("model."))))
    for name, (tensor, rule, why) in found.items():
        assert (
            (tensor, rule) == (f"{name}.weight", "exact")
            if "layers.10." in name or "layers.11." in name
            else "has no tensor in the base" in why
        )


@given(st.data())
def test_a_match_keeps_the_path_and_its_numbers(data: st.DataObject) -> None:
    """Whatever the names: a found tensor has the module's last component and its numbers, and no two modules share one."""
    path = st.lists(st.sampled_from(["a", "b", "model", "0", "1", "q"]), min_size=1, max_size=5).map(".".join)
    modules = data.draw(st.lists(path, min_size=1, max_size=4, unique=True))
    tensors = data.draw(st.lists(path, min_size=1, max_size=6, unique=True))
    found = match_names(modules, weights(*tensors))
    assert list(found).sort() == modules.sort()
    for name, (tensor, _, why) in found.items():
        if not tensor:
            assert why
            continue
        stem = tensor.removesuffix(".weight")
        assert stem in tensors
        assert stem.split(".")[-1] == name.split(".")[-1]
        assert [p for p in stem.split(".") if p.isdigit()] == [p for p in name.split(".") if p.isdigit()]
    if all(m.tensor for m in found.values()):
        assert len({m.tensor for m in found.values()}) == len(modules)


def test_a_missing_lm_head_says_why() -> None:
    found = match_names(["model.q", "lm_head"], weights("model.q", "model.embed_tokens"))
    assert found["model.q"][:2] == ("model.q.weight", "exact")
    assert found["lm_head"] == (
        "",
        "",
        "has no tensor in the base; if lm_head is tied to the embedding there, untie it first",
    )


def test_a_prefix_is_not_exchanged_without_a_layer_number() -> None:
    """One shared last name is no evidence: a classifier is not the pooler."""
    found = match_names(["classifier.dense"], ["pooler.dense.weight", "encoder.layer.0.q.weight"])
    assert found["classifier.dense"].tensor == ""
    assert "has no tensor in the base" in found["classifier.dense"].why

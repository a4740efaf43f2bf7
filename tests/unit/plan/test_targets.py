"""Which base tensor a module changes: shapes, orientation, and one message with every problem."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import torch

import streamer
from streamer.adapters.adapter import DeltaSource
from streamer.adapters.reader import open_adapter
from streamer.errors import MismatchError, UnsupportedError
from streamer.plan.name_matching import match_names
from streamer.plan.targets import Target, match_targets
from streamer.plan.transformers_renames import renames_for
from streamer.storage.checkpoint import open_checkpoint
from streamer.weights.logical import WeightView, open_weights
from streamer.weights.model_config import ModelConfig


def targets_of(weights: WeightView, adapter: DeltaSource, config: dict) -> list[Target]:
    model = ModelConfig(config)
    return match_targets(weights, adapter, model, match_names(adapter.modules, weights, renames_for(model)))


# Shapes and orientation -----------------------------------------------------------------------------------------------


def match_one(home: Path, tensor: torch.Tensor, shape: tuple[int, int], **config: object) -> Target:
    """Match one module of an adapter with this (out, in) to one tensor."""
    base = helpers.write_sharded(home / "base", [{"h.0.fc.weight": tensor}])
    adapter = helpers.write_adapter(home / "adapter", {"h.0.fc": helpers.intruding_factors(*shape, 2)}, r=2, **config)  # type: ignore[arg-type]
    (target,) = targets_of(open_weights(open_checkpoint(base), ModelConfig()), open_adapter(adapter), {})
    return target


@pytest.mark.parametrize(
    ("shape", "flag", "transposed"),
    [
        ((12, 8), False, False),
        ((8, 12), True, True),
        ((12, 8), True, False),  # a linear layer in a model of mixed layers: PEFT ignores the flag there, too
    ],
)
def test_orientation(tmp_path: Path, shape: tuple[int, int], flag: bool, transposed: bool) -> None:
    assert match_one(tmp_path, torch.randn(shape), (12, 8), fan_in_fan_out=flag).transposed == transposed


def test_a_transposed_tensor_needs_the_flag(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"expected shape \[12, 8\] in the base, found \[8, 12\]"):
        match_one(tmp_path, torch.randn(8, 12), (12, 8))


@pytest.mark.parametrize("flag", [True, False])
def test_a_square_matrix_trusts_the_config(tmp_path: Path, flag: bool) -> None:
    """The merged square matrix is W + BA, or its transpose where the base stores (in, out)."""
    W = helpers.power_law(12, 12).float()
    assert match_one(tmp_path, W, (12, 12), fan_in_fan_out=flag).transposed == flag
    A, B = helpers.intruding_factors(12, 12, 2)
    merged = dict(streamer.iter_merged(tmp_path / "base", tmp_path / "adapter", mitigation_lambda=1.0))["h.0.fc.weight"]
    delta = B @ A
    torch.testing.assert_close(merged, W + (delta.T if flag else delta))


def test_a_flag_that_other_layers_contradict(tmp_path: Path) -> None:
    """PEFT ignores the flag on a Linear: a square one would be merged the wrong way round."""
    base = helpers.write_sharded(tmp_path / "base", [{"q.weight": torch.randn(12, 12), "k.weight": torch.randn(8, 12)}])
    factors = {"q": helpers.intruding_factors(12, 12, 2), "k": helpers.intruding_factors(8, 12, 2)}
    adapter = helpers.write_adapter(tmp_path / "adapter", factors, r=2, fan_in_fan_out=True)
    weights = open_weights(open_checkpoint(base), ModelConfig())
    with pytest.raises(MismatchError, match=r"'q': is square and fan_in_fan_out=true .* other layers are stored as"):
        targets_of(weights, open_adapter(adapter), {"model_type": "llama"})
    by_name = {t.tensor: t for t in targets_of(weights, open_adapter(adapter), {"model_type": "gpt2"})}
    assert by_name["q.weight"].transposed
    assert not by_name["k.weight"].transposed


def test_a_transposed_base_gives_transposed_findings_and_merges(tmp_path: Path) -> None:
    """A Conv1D base is the transpose of a linear one, in everything."""
    W = helpers.power_law(64, 48).float()
    factors = {"h.0.fc": helpers.intruding_factors(64, 48, 2)}
    merged = {}
    for flag in (False, True):
        home = tmp_path / str(flag)
        base = helpers.write_sharded(home / "base", [{"h.0.fc.weight": W.T if flag else W}])
        adapter = helpers.write_adapter(home / "adapter", factors, r=2, fan_in_fan_out=flag)
        findings = streamer.detect_intruder_dimensions(base, adapter, top_k=4)
        (matrix,) = findings
        assert matrix.shape == (64, 48)
        assert matrix.detection.intruders
        assert matrix.detection.U.shape[0] == 64
        merged[flag] = dict(streamer.iter_merged(base, adapter, findings=findings, top_k=4, mitigation_lambda=0.25))
    torch.testing.assert_close(merged[True]["h.0.fc.weight"].T, merged[False]["h.0.fc.weight"])


@pytest.mark.parametrize("shape", [(12, 8, 1), (96,), (12, 9)])
def test_a_shape_that_does_not_fit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError) as e:
        match_one(tmp_path, torch.zeros(shape), (12, 8))
    assert f"'h.0.fc': expected shape [12, 8] in the base, found {list(shape)}" in str(e.value)
    assert str(tmp_path / "adapter") in str(e.value)
    assert str(tmp_path / "base") in str(e.value)
    assert "is this the base that the adapter was trained on?" in str(e.value)


def test_a_quantized_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"tensor 'h.0.fc.weight': dtype U8 is not one of .*; use the 16-bit model"
    ):
        match_one(tmp_path, torch.zeros(48, 1, dtype=torch.uint8), (12, 8))


def test_two_modules_for_one_tensor(tmp_path: Path) -> None:
    base = helpers.write_sharded(tmp_path / "base", [{"language_model.model.q.weight": torch.randn(12, 8)}])
    factors = {
        name: helpers.intruding_factors(12, 8, 2) for name in ("language_model.model.q", "model.language_model.q")
    }
    adapter = helpers.write_adapter(tmp_path / "adapter", factors, r=2)
    with pytest.raises(MismatchError, match=r"both change 'language_model.model.q.weight'"):
        targets_of(open_weights(open_checkpoint(base), ModelConfig()), open_adapter(adapter), {})


def test_targets_come_in_the_base_s_file_order(job: tuple[Path, Path]) -> None:
    base, adapter = (open_checkpoint(job[0]), open_adapter(job[1]))
    targets = targets_of(open_weights(base, ModelConfig()), adapter, {})
    order = [t.name for f in base.files.values() for t in f.header.tensors]
    assert [order.index(t.tensor) for t in targets] == sorted(order.index(t.tensor) for t in targets)
    assert {t.module.name for t in targets} == adapter.modules.keys()


def test_every_problem_stands_in_one_message(tmp_path: Path) -> None:
    base = helpers.write_sharded(
        tmp_path / "base", [{"a.q.weight": torch.randn(12, 8), "a.k.weight": torch.randn(12, 9)}]
    )
    modules = ["a.q", "a.k", "a.v", *(f"b.{i}" for i in range(9))]
    adapter = helpers.write_adapter(
        tmp_path / "adapter", {m: helpers.intruding_factors(12, 8, 2) for m in modules}, r=2
    )
    with pytest.raises(MismatchError) as e:
        targets_of(open_weights(open_checkpoint(base), ModelConfig()), open_adapter(adapter), {})
    said = str(e.value)
    assert said.startswith(f"{tmp_path / 'adapter'}: 11 of 12 modules do not fit {tmp_path / 'base'}: ")
    assert "'a.k': expected shape [12, 8] in the base, found [12, 9]" in said
    assert "'a.v' has no tensor in the base" in said
    assert "; and 9 more; is this the base that the adapter was trained on?" in said
    assert "\n" not in said

"""Which base tensor a module changes: shapes, orientation, and one message with every problem."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import torch

from streamer.adapters.adapter import DeltaSource, open_adapter
from streamer.errors import MismatchError
from streamer.plan.name_matching import match_names
from streamer.plan.names import NameIndex
from streamer.plan.targets import Orientation, Target, match_targets
from streamer.storage.checkpoint import open_checkpoint
from streamer.weights.logical import WeightView, open_weights
from streamer.weights.model_config import ModelConfig


def targets_of(weights: WeightView, adapter: DeltaSource, config: dict) -> list[Target]:
    model = ModelConfig(config)
    names = NameIndex.of(weights, model)
    orientation = Orientation.of(weights.checkpoint, model)
    matches = match_names(adapter.modules, names)
    return match_targets(weights, adapter, orientation, matches, names)


# Shapes and orientation -----------------------------------------------------------------------------------------------


def match_one(home: Path, tensor: torch.Tensor, shape: tuple[int, int], **config: object) -> Target:
    """Match one module of an adapter with this (out, in) to one tensor."""
    base = helpers.write_sharded(home / "base", [{"h.0.fc.weight": tensor}])
    adapter = helpers.write_adapter(
        home / "adapter", {"h.0.fc": helpers.intruding_factors(*shape, 2)}, r=2, **config
    )  # type: ignore[arg-type]
    (target,) = targets_of(
        open_weights(open_checkpoint(base), ModelConfig()), open_adapter(adapter), {}
    )
    return target


@pytest.mark.parametrize(
    ("shape", "flag", "transposed"),
    [
        ((12, 8), False, False),
        ((8, 12), True, True),
        (
            (12, 8),
            True,
            False,
        ),  # a linear layer in a model of mixed layers: PEFT ignores the flag there, too
    ],
)
def test_a_tensor_is_transposed_as_its_shape_or_the_flag_says(
    tmp_path: Path, shape: tuple[int, int], flag: bool, transposed: bool
) -> None:
    assert (
        match_one(tmp_path, torch.randn(shape), (12, 8), fan_in_fan_out=flag).transposed
        == transposed
    )


def test_a_transposed_tensor_needs_the_flag(tmp_path: Path) -> None:
    with pytest.raises(
        MismatchError, match=r"expected shape \[12, 8\] in the base, found \[8, 12\]"
    ):
        match_one(tmp_path, torch.randn(8, 12), (12, 8))


def test_a_type_of_several_classes_that_agree(tmp_path: Path) -> None:
    """Where these have Conv1D, a bias of the base's shows that it has, too."""
    adapter = helpers.write_adapter(
        tmp_path / "adapter", {"h.0.mlp.c_fc": helpers.intruding_factors(12, 12, 2)}, r=2
    )
    for kind, shape in {"none": None, "linear": (36, 12), "conv1d": (12, 36)}.items():
        tensors = {
            "h.0.mlp.c_fc.weight": torch.randn(12, 12),
            "h.0.attn.c_attn.bias": torch.randn(36),
        }
        if shape:
            tensors["h.0.attn.c_attn.weight"] = torch.randn(shape)
        base = helpers.write_sharded(tmp_path / kind, [tensors])
        weights = open_weights(open_checkpoint(base), ModelConfig())
        for model_type, of_type in {"gpt2": "conv1d", "llama": "linear"}.items():
            if kind in (of_type, "linear") or (kind, model_type) == ("none", "llama"):
                (target,) = targets_of(weights, open_adapter(adapter), {"model_type": model_type})
                assert target.transposed == (kind == "conv1d")
            else:
                with pytest.raises(MismatchError, match="--architecture NAME"):
                    targets_of(weights, open_adapter(adapter), {"model_type": model_type})
        if kind == "none":
            with pytest.raises(
                MismatchError, match="as a Conv1D"
            ):  # transformers has classes of no type, which are not meant
                targets_of(weights, open_adapter(adapter), {"model_type": ""})


def test_two_modules_for_one_tensor(tmp_path: Path) -> None:
    base = helpers.write_sharded(
        tmp_path / "base", [{"language_model.model.q.weight": torch.randn(12, 8)}]
    )
    factors = {
        name: helpers.intruding_factors(12, 8, 2)
        for name in ("language_model.model.q", "model.language_model.q")
    }
    adapter = helpers.write_adapter(tmp_path / "adapter", factors, r=2)
    with pytest.raises(MismatchError, match=r"both change 'language_model.model.q.weight'"):
        targets_of(open_weights(open_checkpoint(base), ModelConfig()), open_adapter(adapter), {})


def test_targets_come_in_the_base_s_file_order(job: tuple[Path, Path]) -> None:
    base = open_checkpoint(job[0])
    adapter = open_adapter(job[1])
    targets = targets_of(open_weights(base, ModelConfig()), adapter, {})
    order = [t.name for f in base.files.values() for t in f.header.tensors]
    assert [order.index(t.tensor) for t in targets] == sorted(
        order.index(t.tensor) for t in targets
    )
    assert {t.module.name for t in targets} == adapter.modules.keys()

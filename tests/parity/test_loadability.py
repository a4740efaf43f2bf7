"""Outputs load: for each class, a merge and a mitigated adapter have the names, shapes and ties that transformers and PEFT expect."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from test_architectures_table import MODELS, built

import streamer
from streamer.errors import UnsupportedError

KINDS: dict[str, dict[str, Any]] = {
    "linear layers": {"target_modules": "all-linear"},
    "embedding saved": {"modules_to_save": ["embed"]},
    "head saved": {"modules_to_save": ["head"]},
    "tokens": {"trainable_token_indices": {"embed": [3, 5]}},
    "biases": {"bias": "all"},
}
"""PEFT's options; ``embed`` and ``head`` stand for the class's own modules."""


def complaints(directory: Path, cls: str) -> set[str]:
    """List what transformers says on loading a model."""
    _, info = getattr(transformers, cls).from_pretrained(
        directory, output_loading_info=True, ignore_mismatched_sizes=True
    )
    return {str(entry) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for entry in info[kind]}


def options(kind: str, model: Any, linear: list[str]) -> dict[str, Any] | None:
    """Make PEFT's options for a class; None if it lacks the module."""
    modules = {id(module): path for path, module in model.named_modules()}
    places = {
        "embed": modules.get(id(model.get_input_embeddings())),
        "head": modules.get(id(model.get_output_embeddings())),
    }
    values: dict[str, Any] = {"target_modules": linear, **copy.deepcopy(KINDS[kind])}
    if (saved := values.get("modules_to_save")) is not None:
        values["modules_to_save"] = [places[saved[0]]]
    if (tokens := values.get("trainable_token_indices")) is not None:
        values["trainable_token_indices"] = {places["embed"]: tokens["embed"]}
    return None if None in (*values.get("modules_to_save", ()), *values.get("trainable_token_indices", ())) else values


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_outputs_load_without_complaints(name: str, tmp_path: Path) -> None:
    cls = MODELS[name][0]
    built(name, None, tmp_path / "base")
    before, made, written = complaints(tmp_path / "base", cls), 0, 0
    linear = sorted({
        path.rpartition(".")[2] for path, module in getattr(transformers, cls).from_pretrained(tmp_path / "base").named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    })  # fmt: skip
    for kind in KINDS:
        model = getattr(transformers, cls).from_pretrained(tmp_path / "base")
        adapter = tmp_path / kind
        try:
            with warnings.catch_warnings(action="ignore"):
                values = options(kind, model, linear)
                if values is None:
                    continue
                trained = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **values))
                trained.save_pretrained(adapter)
        except (
            AttributeError,
            NotImplementedError,
            TypeError,
            ValueError,
            KeyError,
        ):  # PEFT cannot adapt this class so
            continue
        made += 1
        for command in (streamer.merge_with_reduced_intruder_dimensions, streamer.reduce_intruder_dimension):
            out = tmp_path / f"{kind} {command.__name__}"
            try:
                with warnings.catch_warnings(action="ignore"):
                    command(tmp_path / "base", adapter, out, method="shrink", mitigation_lambda=0.5)
            except UnsupportedError:
                continue
            written += 1
            if command is streamer.merge_with_reduced_intruder_dimensions:
                assert complaints(out, cls) <= before, kind
                continue
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                fresh = getattr(transformers, cls).from_pretrained(tmp_path / "base")
                peft.PeftModel.from_pretrained(fresh, out)
            assert not [w for w in said if "missing" in str(w.message) or "unexpected" in str(w.message)], kind
            assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    assert written or not made  # Mamba's layers are none that PEFT adapts

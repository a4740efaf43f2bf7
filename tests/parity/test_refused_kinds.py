"""Kinds of adapters that are refused: what is said of merging them with PEFT is what PEFT does."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from streamer.adapters.adapter_config import AdapterConfig
from streamer.adapters.config_rules import NEVER_MERGED, peft_merges


def merging_layers(tuner: type[Any]) -> list[str]:
    """The layers of a method in PEFT whose `merge` does something else than to raise."""
    found: list[str] = []
    package = tuner.__module__.rpartition(".")[0]
    for name in ("layer", "layers", "model"):
        try:
            module = importlib.import_module(f"{package}.{name}")
        except ImportError:
            continue
        for layer in vars(module).values():
            if not (inspect.isclass(layer) and issubclass(layer, BaseTunerLayer) and layer is not BaseTunerLayer):
                continue
            if (merge := vars(layer).get("merge")) is not None:
                (function,) = ast.parse(textwrap.dedent(inspect.getsource(merge))).body
                assert isinstance(function, ast.FunctionDef)
                body = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
                if not isinstance(body[0], ast.Raise):
                    found.append(layer.__name__)
    return found


@pytest.mark.parametrize("kind", PEFT_TYPE_TO_TUNER_MAPPING)
def test_peft_merges_what_it_is_said_to_merge(kind: str, tmp_path: Any) -> None:
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    merges = issubclass(tuner, BaseTuner) and bool(merging_layers(tuner))
    assert merges == (str(kind.value) not in NEVER_MERGED)
    assert peft_merges(AdapterConfig({"peft_type": str(kind.value)}, tmp_path)) == merges

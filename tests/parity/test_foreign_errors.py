"""What a model's own code raises as it runs, and what it says of its positions, end in one line that names the part and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zoo
from architectures import config
from causal_models import make_adapter
from evaluated import streamed, token_ids
from seeds import vary
from transformers.models.llama.modeling_llama import LlamaMLP

import streamer
from streamer.errors import UnsupportedError, UsageError
from streamer.plan.plan import make_plan
from streamer.streaming.extra import refused_errors
from streamer.streaming.model import StreamingModel
from streamer.streaming.values import VariantSet
from streamer.streaming.variants import BASE, Variant, make_variants


def make_inputs(name: str, target: str, path: Path, length: int = 12, **values: Any) -> dict[str, Path]:
    """A tiny model of a class, an adapter, and texts of so many tokens."""
    made = zoo.config_of(name)
    for key, value in {"is_decoder": True, **values}.items():
        setattr(made, key, value)
    torch.manual_seed(vary(0))
    model = getattr(transformers, name)(made)
    model.save_pretrained(path / "base")
    adapter = make_adapter(type(model), path / "base", path / "adapter", [target])
    for text, ids in (("general", token_ids(60, 4, length) + 2), ("task", token_ids(50, 4, length) + 2)):
        np.save(path / f"{text}.npy", ids)
    return {"base": path / "base", "adapter": adapter, **{t: path / f"{t}.npy" for t in ("general", "task")}}


def test_an_error_of_the_models_own_code_names_the_module(tmp_path: Path) -> None:
    given = make_inputs("XmodForCausalLM", "query", tmp_path, default_language=None)
    for run in (streamer.evaluate_variants, streamer.fit_coefficients):
        with pytest.raises(
            UnsupportedError,
            match=r"base: module 'roberta' of XmodForCausalLM raises ValueError: Input language unknown",
        ) as e:
            run(**given, on_event=str)
        assert len(str(e.value).replace(str(tmp_path), "")) <= 300


RAISED = {
    "the model's": (UnsupportedError, r"module 'model.layers.0.mlp' of Llama\w+ raises KeyError: 'absent'"),
    "memory": (MemoryError, "allocate"),
}


@pytest.mark.parametrize("kind", RAISED)
def test_what_ends_a_pass_is_one_of_our_errors_unless_memory_is_short(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = make_inputs("LlamaForCausalLM", "q_proj", tmp_path)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.empty(1 << 60) if kind == "memory" else {}["absent"]

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    error, message = RAISED[kind]
    with pytest.raises(error, match=message):
        streamed(given["base"], given["adapter"], make_variants(("shrink",), (0.5,), "all"), None, token_ids(60))


def test_a_fault_of_this_package_keeps_its_traceback() -> None:
    names: dict[str, Any] = {"__name__": "streamer.part"}
    exec("def fault():\n    raise KeyError('absent')", names)  # a function of a module of ours
    with pytest.raises(KeyError, match="absent"), refused_errors(Path("base"), torch.nn.Linear(1, 1)):
        names["fault"]()


def test_a_config_of_which_transformers_makes_no_model(tmp_path: Path) -> None:
    given = make_inputs("LlamaForCausalLM", "q_proj", tmp_path)
    file = given["base"] / "config.json"
    file.write_text(re.sub(r'"hidden_act": "\w+"', '"hidden_act": "none such"', file.read_text()))
    with pytest.raises(
        UnsupportedError, match=r"config.json: transformers cannot build LlamaForCausalLM from it: .*none such"
    ):
        streamer.evaluate_variants(**given)


POSITIONS = {
    "RobertaForCausalLM": ("query", 63),
    "XLNetLMHeadModel": ("layer_1", None),
    "OPTForCausalLM": ("q_proj", 64),
}
"""Class → module of an adapter, tokens that a sequence may have: in RoBERTa's table of 64 rows the first is of padding."""


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_are_those_that_the_model_takes(name: str, tmp_path: Path) -> None:
    target, positions = POSITIONS[name]
    given = make_inputs(name, target, tmp_path, length=positions or 12)
    model = StreamingModel(VariantSet(make_plan(given["base"], given["adapter"]), (Variant(BASE, None),), None))
    assert model.positions == positions
    if positions is None:
        with pytest.raises(
            UnsupportedError, match=r"'transformer.layer.0.ff.layer_1' runs on .* variants cannot be told apart"
        ):
            streamer.evaluate_variants(**given, methods=["shrink"], lambdas=(0.5,))
        return
    streamer.evaluate_variants(**given, methods=["shrink"], lambdas=(0.5,))
    np.save(given["task"], token_ids(50, 4, positions + 1))
    with pytest.raises(
        UsageError,
        match=rf"has {positions + 1} tokens, and the model {positions} positions; give --length {positions}$",
    ):
        streamer.evaluate_variants(**given, methods=["shrink"], lambdas=(0.5,))


def test_a_row_that_a_table_does_not_have_is_not_read_from_the_bytes_behind_it(tmp_path: Path) -> None:
    torch.manual_seed(vary(0))
    model = transformers.GPT2LMHeadModel(config("GPT2", n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=16))
    model.save_pretrained(tmp_path / "base")
    adapter = make_adapter(type(model), tmp_path / "base", tmp_path / "adapter", ["c_attn"])
    variants = make_variants(("shrink",), (0.5,), "all")
    with pytest.raises(
        UnsupportedError, match=r"'transformer.wpe.weight': expected rows 0 to 15, found 0 to 17 looked up"
    ):
        streamed(tmp_path / "base", adapter, variants, None, token_ids(64, 2, 18))

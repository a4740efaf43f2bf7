"""Factors of a fit on a live model: what files give, and what is refused before a weight is changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import kinds_cases
import pytest
import torch
from fitted import random_coefficients
from kinds_cases import Made
from live import adapter_state, assert_equal, load_state, loaded

import streamer
import streamer.peft as live
from streamer.errors import MismatchError
from streamer.methods.coefficients import Coefficients


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return kinds_cases.make("linear", torch.float32, tmp_path_factory.mktemp("fitted"))


@pytest.fixture(scope="module")
def coefficients(made: Made) -> Coefficients:
    return random_coefficients(made.base, made.adapter)


def test_they_do_what_they_do_to_files(made: Made, coefficients: Coefficients, tmp_path: Path) -> None:
    model = loaded(made)
    assert live.reduce_intruder_dimension(model, coefficients=coefficients) is None
    streamer.reduce_intruder_dimension(made.base, made.adapter, tmp_path / "out", coefficients=coefficients)
    assert_equal(adapter_state(model, "intruder_reduced"), load_state(tmp_path / "out"))
    merged = live.merge_and_unload_with_reduced_intruder_dimensions(model, coefficients=coefficients)
    theirs = dict(streamer.iter_merged(made.base, made.adapter, coefficients=coefficients))
    assert_equal(kinds_cases.by_disk(merged.state_dict(), theirs), theirs)


def test_those_of_another_adapter_leave_the_model_as_it_was(
    made: Made, coefficients: Coefficients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another rank, or of fewer matrices: refused before any is read."""
    (one,) = coefficients.sets
    name, model = list(one.matrices)[-1], loaded(made)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.delattr("streamer.methods.factors.FactorSet.mitigated")
    narrow = {**one.matrices, name: one.matrices[name][:, :1]}
    fewer = {key: one.matrices[key] for key in one.matrices if key != name}
    for matrices, words in ((narrow, "do not fit 1 of the adapter's matrices"), (fewer, "fit them to this adapter")):
        wrong = dataclasses.replace(coefficients, sets=(dataclasses.replace(one, matrices=matrices),))
        for act in (live.reduce_intruder_dimension, live.merge_and_unload_with_reduced_intruder_dimensions):
            with pytest.raises(MismatchError, match=words):
                act(model, coefficients=wrong)
            assert model.state_dict().keys() == before.keys()
            assert_equal(model.state_dict(), before)

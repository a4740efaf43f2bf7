"""A fit by inputs: its progress, and what it says of texts and inputs that it cannot do well."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ATTENTION
from causal_models import make_adapter, make_base
from evaluated import sequences
from helpers import sealed
from learned import make_learned
from safetensors.torch import load_file, save_file
from seeds import vary

import streamer
from streamer.errors import FormatError, MismatchError, NumericError, OutputExistsError
from streamer.events import Event
from streamer.linalg.torch_state import threads
from streamer.plan.plan import make_plan
from streamer.streaming.inputs import InputModel
from streamer.streaming.streams import GENERAL_AS, TASK_AS, Group


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_learned(tmp_path_factory.mktemp("inputs"), sequences=48)


def test_progress_by_turns_is_even(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of sequences run by turns, and each step is about as long as the others."""
    monkeypatch.setattr("streamer.fitting.fit_memory.ROWS", 54)
    monkeypatch.setattr("streamer.fitting.prepare.ROWS", 54)
    steps: list[Event] = []
    streamer.fit_coefficients(
        home / "base",
        home / "adapter",
        general=home / "general.npy",
        task=home / "task.npy",
        sequences=24,
        length=8,
        on_event=steps.append,
    )
    done = [event.done for event in steps if event.stage == "fit"]
    assert done == sorted(done)
    products = max(b - a for a, b in itertools.pairwise(done))
    assert products < 0.1 * done[-1]


def test_a_short_text_is_told(home: Path) -> None:
    warned: list[str] = []
    given = {"general": home / "general.npy", "task": home / "task.npy", "sequences": 8, "length": 5}
    with contextlib.suppress(MismatchError):  # so little text may not show what was learned
        streamer.fit_coefficients(
            home / "base", home / "adapter", **given, on_event=lambda event: warned.append(event.name)
        )
    assert any(
        re.search(
            r"text has 24 tokens to fit on, fewer than the 32 inputs of the widest matrix: the ridge decides what it does not show",
            one,
        )
        for one in warned
    )


def test_a_file_of_another_algorithm_or_a_damaged_one_is_not_this_fit(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.safetensors"

    def fit(**options: bool) -> streamer.Coefficients:
        return streamer.fit_coefficients(home / "base", home / "adapter", path, general=home / "general.npy", task=home / "task.npy",
                                         sequences=24, on_event=lambda event: None, **options)  # fmt: skip

    with monkeypatch.context() as other:
        other.setattr("streamer.fitting.prepare.ALGORITHM", 1)
        assert fit().facts == fit().facts
    with pytest.raises(OutputExistsError, match="holds coefficients of other inputs or options"):
        fit()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FormatError, match=r"f\.safetensors: is damaged: expected SHA-256"):
        streamer.load_coefficients(path)
    with pytest.raises(OutputExistsError, match=r"make coefficients with `streamer fit`, or pass --overwrite$"):
        fit()
    fit(overwrite=True)
    assert fit().facts == streamer.load_coefficients(path).facts
    path.write_bytes(sealed(path.read_bytes().replace(b"streamer.coefficients/3", b"streamer.coefficients/2")))
    with pytest.raises(
        OutputExistsError, match=r"expected streamer\.coefficients/3, found 'streamer\.coefficients/2'; .*--overwrite$"
    ):
        fit()


def test_what_a_saved_module_keeps_alone_can_be_more_than_was_asked_for(tmp_path: Path) -> None:
    """No deltas are left then, and the figures are those of the shrink that leaves none."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_adapter(make_base("llama", base), base, adapter, ATTENTION, modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    tensors, head = load_file(file), load_file(base / "model.safetensors")["lm_head.weight"]
    tensors = {name: head + (tensor - head) / 3 if "lm_head" in name else tensor for name, tensor in tensors.items()}
    save_file(
        {name: tensor * (0.5 if "lora_B" in name else 1.0) for name, tensor in tensors.items()}, file, {"format": "pt"}
    )
    ids = np.random.default_rng(vary(0)).integers(3, 64, (1500, 8))
    np.save(tmp_path / "all.npy", ids)
    found = streamer.evaluate_variants(base, adapter, general=tmp_path / "all.npy", task=tmp_path / "all.npy", methods=["shrink"],
                                       lambdas=[0.0], sequences=1500, length=8, race=False, on_event=lambda event: None)  # fmt: skip
    whole, alone = (found.task.loss[0] - found.task.loss[row] for row in (1, 2))
    np.save(tmp_path / "task.npy", ids[np.argsort(-np.minimum(whole, 2 * alone))[:64]])
    np.save(tmp_path / "general.npy", ids[np.argsort(whole)[:64]])
    warned: list[str] = []
    made = streamer.fit_coefficients(
        base, adapter, general=tmp_path / "general.npy", task=tmp_path / "task.npy", sequences=64, length=8, keep=(0.95, 0.01),
        on_event=lambda event: warned.append(event.name),
    )  # fmt: skip
    some, none = made.facts["sets"]
    assert (some["mu"] > 0, none["mu"], none["exceeded"]) == (True, None, True)
    assert none["kept"] > 0.04
    assert none["shrink"]["lambda"] == pytest.approx(0, abs=1e-9)
    assert none["forgetting"] == pytest.approx(none["shrink"]["forgetting"])
    assert not any(factor.any() for factor in made.select(0.01).matrices.values())
    assert any(factor.any() for factor in made.select(0.95).matrices.values())
    assert any(
        line.startswith("1% was") and line.endswith("what the adapter saves besides deltas keeps this much by itself")
        for line in warned
    )


def test_inputs_that_are_not_finite_are_told_by_module(home: Path, tmp_path: Path) -> None:
    """In the layer where they first are: a norm's weight that overflows."""
    shutil.copytree(home / "base", tmp_path / "base")
    (file,) = (tmp_path / "base").glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.1.input_layernorm.weight"
    tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, file, metadata={"format": "pt"})
    plan = make_plan(tmp_path / "base", home / "adapter")
    ids = torch.from_numpy(np.load(home / "general.npy")[:2, :8])
    model, seen = InputModel(plan), list[str]()
    groups = [Group(sequences(ids), v, lambda tensor: None) for v in (GENERAL_AS, TASK_AS)]
    with (
        threads(),
        pytest.raises(NumericError, match=r"the inputs of 'model\.layers\.1\.\S+' are NaN or Inf on the texts"),
    ):
        model.collect(groups, lambda targets, moments: seen.extend(target.tensor for target in targets))
    assert any("layers.0" in tensor for tensor in seen)

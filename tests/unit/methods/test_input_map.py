"""Maps of a base's inputs: their file, what is refused of it, and sums of several."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import torch
from fitted import random_map
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamer.errors import FormatError, OutputExistsError
from streamer.methods.files import MAP, InputMap, load_map


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return helpers.three_shards(tmp_path_factory.mktemp("map"))


@pytest.fixture
def made(inputs: tuple[Path, Path]) -> InputMap:
    return random_map(*inputs)


def test_a_file_holds_it_whole(made: InputMap, tmp_path: Path) -> None:
    made.save(tmp_path / "new" / "m.safetensors")
    found = load_map(tmp_path / "new" / "m.safetensors")
    assert (found.digest, dict(found.facts)) == (made.digest, dict(made.facts))
    assert found.name == str(tmp_path / "new" / "m.safetensors")
    for one, other in zip(made.inputs, found.inputs, strict=True):
        assert (one.names, one.tokens, one.size, one.trace) == (other.names, other.tokens, other.size, other.trace)
        assert torch.equal(one.values, other.values)
        assert one.vectors is not None
        assert other.vectors is not None
        assert torch.equal(one.vectors, other.vectors)
    before = (tmp_path / "new" / "m.safetensors").read_bytes()
    with pytest.raises(OutputExistsError, match="pass overwrite=True"):
        made.save(tmp_path / "new" / "m.safetensors")
    made.save(tmp_path / "new" / "m.safetensors", overwrite=True)
    assert (tmp_path / "new" / "m.safetensors").read_bytes() == before
    (tmp_path / "other").write_text("mine")
    with pytest.raises(OutputExistsError, match="is not a map"):
        made.save(tmp_path / "other", overwrite=True)
    assert "5 vectors of 9 inputs of 9 matrices, on random.txt" in repr(found)


def test_vectors_are_orthonormal_whatever_rounding_did(made: InputMap) -> None:
    for one in made.inputs:
        V = one.spectrum.vectors
        assert V is not None
        torch.testing.assert_close(V.T @ V, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


def changed(path: Path, array: str = "", by: float = 1.0, **keys: object) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tree, tensors = json.loads(metadata[MAP.key]), load_file(path)
    if array:
        tensors[array] = tensors[array] * by
    save_file(tensors, path, {**metadata, MAP.key: json.dumps({**tree, **keys})})
    path.write_bytes(helpers.sealed(path.read_bytes()))


FIRST = "model.layers.0.self_attn.q_proj.weight"
FAULTS = {
    "another version": (
        {"schema": "streamer.map/1"},
        "another version: expected streamer.map/2, found 'streamer.map/1'; make a map",
    ),
    "NaN": ({"array": f"{FIRST}.eigenvalues", "by": float("nan")}, "invalid eigenvalues"),
    "longer vectors": ({"array": f"{FIRST}.vectors", "by": 1.5}, "are not orthonormal"),
    "no inputs": ({"inputs": []}, "arrays do not match its inputs"),
    "another base": ({"base": 3}, "the identity of the base or of the adapter has the wrong form"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_file_is_refused_for(made: InputMap, tmp_path: Path, fault: str) -> None:
    change, says = FAULTS[fault]
    made.save(tmp_path / "m.safetensors")
    changed(tmp_path / "m.safetensors", **change)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=says):
        load_map(tmp_path / "m.safetensors")


def test_other_files_are_no_maps(inputs: tuple[Path, Path]) -> None:
    with pytest.raises(FormatError, match="found another safetensors file; make a map with `streamer map`"):
        load_map(inputs[1] / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="found a directory"):
        load_map(inputs[0])

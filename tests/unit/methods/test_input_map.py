"""Maps of a base's inputs: their file, what is refused of it, and sums of several."""

from __future__ import annotations

from pathlib import Path

import helpers
import pytest
import torch
from fitted import random_map

from streamer.errors import FormatError, OutputExistsError
from streamer.methods.files import InputMap, load_map


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return helpers.three_shards(tmp_path_factory.mktemp("map"))


@pytest.fixture
def made(inputs: tuple[Path, Path]) -> InputMap:
    return random_map(*inputs)


def test_a_map_is_read_back_whole_from_its_file(made: InputMap, tmp_path: Path) -> None:
    made.save(tmp_path / "new" / "m.safetensors")
    found = load_map(tmp_path / "new" / "m.safetensors")
    assert (found.digest, dict(found.facts)) == (made.digest, dict(made.facts))
    assert found.name == str(tmp_path / "new" / "m.safetensors")
    for one, other in zip(made.inputs, found.inputs, strict=True):
        assert (one.names, one.tokens, one.size, one.trace) == (
            other.names,
            other.tokens,
            other.size,
            other.trace,
        )
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


def test_a_file_of_another_version_is_refused(made: InputMap, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    made.save(path)
    path.write_bytes(
        helpers.sealed(path.read_bytes().replace(b"streamer.map/2", b"streamer.map/1"))
    )
    with pytest.raises(
        FormatError,
        match=r"another version: expected streamer.map/2, found 'streamer.map/1'; make a map",
    ):
        load_map(path)


def test_other_files_are_no_maps(inputs: tuple[Path, Path]) -> None:
    with pytest.raises(
        FormatError, match="found another safetensors file; make a map with `streamer map`"
    ):
        load_map(inputs[1] / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="found a directory"):
        load_map(inputs[0])

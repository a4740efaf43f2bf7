"""Factors of a fit, applied to deltas; and their file."""

from pathlib import Path

import pytest
import torch
from helpers import tampered
from planted import problem
from safetensors.numpy import load_file

from streamer.errors import FormatError, MismatchError
from streamer.linalg.operators import Dense, LowRank
from streamer.methods import RegMean
from streamer.methods.files import FIT, Coefficients, load_coefficients

FACTS = {"base": {"files": []}, "adapter": {"modules": 2}, "grain": "inputs"}


def made(keep: float) -> Coefficients:
    matrices = {
        "a.weight": torch.tensor([[3.0, 2.0], [1.0, 0.5]]),
        "b.weight": torch.tensor([[1.5]]),
    }
    return Coefficients(keep, {name: keep * factor for name, factor in matrices.items()}, FACTS)


def test_they_print_in_a_line(tmp_path: Path) -> None:
    assert repr(made(0.9)) == "<Coefficients: keep 0.9, factors of 2 matrices>"
    made(0.9).save(path := tmp_path / "c.safetensors")
    assert (
        repr(load_coefficients(path))
        == f"<Coefficients: keep 0.9, factors of 2 matrices from {path}>"
    )


def test_mitigate_takes_them_by_the_name_of_the_matrix() -> None:
    delta = problem(30, 20)[1]
    R = torch.randn(delta.R.shape)
    one = Coefficients(0.9, {"x": R})
    options = RegMean(coefficients=one)
    after = options.mitigated(delta, None, "x")
    assert isinstance(after, LowRank)
    assert torch.equal(after.L, delta.L.double())  # B stays as it is
    torch.testing.assert_close(after.dense(), delta.L.double() @ R.double().T)
    assert not options.needs_detection
    record = {"keep": 0.9, "sha256": one.digest}
    assert options.as_json() == {
        "method": "regmean",
        "scale": "all",
        "lambda": None,
        "coefficients": record,
    }
    assert options.as_dict()["coefficients"] == record
    for other in (Dense(delta.dense()), LowRank(delta.L, delta.R[:7])):
        with pytest.raises(
            MismatchError,
            match="the factor of 'x' does not have this adapter's shape; fit it to this",
        ):
            options.mitigated(other, None, "x")


def test_digests_tell_coefficients_apart() -> None:
    assert made(0.9).digest == made(0.9).digest
    assert made(0.9).digest != made(0.8).digest


def test_the_file_holds_them_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "c.safetensors"
    coefficients = made(0.95)
    coefficients.save(path)
    assert load_file(path)["a.weight.right_factor"].shape == (1, 2, 2)
    read = load_coefficients(path)
    assert read.facts == FACTS
    assert read.keep == 0.95
    assert read.digest == coefficients.digest
    assert torch.equal(read.matrices["a.weight"], coefficients.matrices["a.weight"])
    again = tmp_path / "again.safetensors"
    read.save(again)
    assert again.read_bytes() == path.read_bytes()
    tampered(path, again, FIT.key, lambda tree, _: tree.update(keeps=[0.95, 0.9]))
    with pytest.raises(
        FormatError,
        match="expected factors for one share of the learning, found 2; make coefficients",
    ):
        load_coefficients(again)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    made(0.9).save(path)
    tampered(path, path, FIT.key, lambda tree, _: tree.update(schema="streamer.coefficients/1"))
    words = "another version: expected streamer.coefficients/3, found 'streamer.coefficients/1'"
    with pytest.raises(FormatError, match=words):
        load_coefficients(path)

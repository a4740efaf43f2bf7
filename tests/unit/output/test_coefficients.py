"""Coefficients of a delta's own directions, against the dense formula in float64; and their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import sealed
from planted import problem
from safetensors.numpy import load_file, save_file

from streamer.errors import FormatError, MismatchError, OutputExistsError, UsageError
from streamer.linalg.low_rank import LowRank
from streamer.linalg.operators import Dense
from streamer.methods import METHODS, Fitted, make_method
from streamer.methods.coefficient_set import CoefficientSet, MatrixCoefficients, directions, fitted_delta, groups
from streamer.methods.coefficients import Coefficients, load_coefficients
from streamer.methods.coefficients_file import FIT

FACTS = {"base": {"files": []}, "adapter": {"modules": 2}, "options": {"grain": "direction"}}


def made(*keeps: float) -> Coefficients:
    matrices = {
        "a.weight": (np.array([3.0, 2.0]), np.array([0.25, 1.0])),
        "b.weight": (np.array([1.5]), np.array([0.0])),
    }
    sets = [
        CoefficientSet(keep, {name: MatrixCoefficients(s, c * keep) for name, (s, c) in matrices.items()})
        for keep in keeps
    ]
    return Coefficients(tuple(sets), FACTS)


def test_they_print_in_a_few_lines(tmp_path: Path) -> None:
    assert repr(made(0.9, 0.5)) == (
        "<Coefficients: 2 sets\n <CoefficientSet: keep 0.9, 3 coefficients of mean 0.375 in 2 matrices>"
        "\n <CoefficientSet: keep 0.5, 3 coefficients of mean 0.208 in 2 matrices>>"
    )
    made(0.9).save(tmp_path / "c.safetensors")
    assert repr(load_coefficients(tmp_path / "c.safetensors")).startswith(
        f"<Coefficients: 1 set from {tmp_path}/c.safe"
    )


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (61, 67)])
def test_fitted_is_its_formula(shape: tuple[int, int]) -> None:
    delta = problem(*shape)[1]
    U, S, Vh = np.linalg.svd(delta.L.double().numpy() @ delta.R.double().numpy().T, full_matrices=False)
    s, p = directions(delta), delta.rank
    np.testing.assert_allclose(s, S[:p], rtol=1e-12)
    c = np.array([0.3, 1.0, 0.0, 0.8])
    fitted = fitted_delta(delta, MatrixCoefficients(s, c), "x")
    np.testing.assert_allclose(fitted.dense(), (U[:, :p] * S[:p] * c) @ Vh[:p], atol=1e-12 * S[0])
    assert isinstance(fitted, LowRank)
    assert fitted.rank == delta.rank
    assert torch.equal(fitted.R, delta.R.double())  # A stays as it is


def test_coefficients_of_one_change_nothing() -> None:
    delta = problem(30, 20)[1]
    matrix = MatrixCoefficients(directions(delta), np.ones(4))
    assert fitted_delta(delta, matrix, "x") is delta
    dense = Dense(delta.dense())
    assert fitted_delta(dense, MatrixCoefficients(directions(dense), np.ones(1)), "x") is dense


def test_a_dense_delta_has_one_coefficient() -> None:
    dense = Dense(problem(30, 20)[1].dense())
    s = directions(dense)
    assert s == pytest.approx([float(torch.linalg.matrix_norm(dense.matrix.double()))])
    fitted = fitted_delta(dense, MatrixCoefficients(s, np.array([0.25])), "x")
    torch.testing.assert_close(fitted.dense(), 0.25 * dense.matrix)


def test_groups_join_what_no_machine_tells_apart() -> None:
    assert groups([3, 2, 2 - 1e-6, 2 - 2e-6, 1, 1e-8]).tolist() == [0, 1, 1, 1, 2, -1]
    assert groups([3, 2, 2 - 1e-5]).tolist() == [0, 1, 2]
    assert groups([0.0, 0.0]).tolist() == [-1, -1]
    assert groups([1.0]).tolist() == [0]


@pytest.mark.parametrize("dense", [False, True])
def test_coefficients_of_another_adapter_are_refused(dense: bool) -> None:
    low = problem(30, 20)[1]
    delta = Dense(low.dense()) if dense else low
    s = directions(delta)
    c = np.full(len(s), 0.5)
    fitted_delta(delta, MatrixCoefficients(s + 5e-7 * s[0], c), "x")
    with pytest.raises(MismatchError, match=r"coefficients: direction . of 'x' .* they belong to another adapter$"):
        fitted_delta(delta, MatrixCoefficients(s + 2e-6 * s[0], c), "x")
    with pytest.raises(MismatchError, match=rf"coefficients: has 7 for 'x', whose delta has {len(s)} directions"):
        fitted_delta(delta, MatrixCoefficients(np.ones(7), np.zeros(7)), "x")


def test_mitigate_takes_them_by_the_name_of_the_matrix() -> None:
    delta = problem(30, 20)[1]
    s = directions(delta)
    one = CoefficientSet(0.9, {"x": MatrixCoefficients(s, np.full(4, 0.5))})
    options = Fitted(coefficients=one)
    torch.testing.assert_close(options.mitigated(delta, None, "x").dense(), 0.5 * delta.precise().dense())
    assert not options.needs_detection
    record = {"keep": 0.9, "sha256": one.digest}
    assert options.as_json() == {"method": "fitted", "scale": "all", "lambda": None, "coefficients": record}
    assert options.as_dict()["coefficients"] == record


def test_options_that_make_no_sense() -> None:
    one = made(0.9).select()
    with pytest.raises(UsageError, match=r"^method 'fitted' needs coefficients; make them with `streamer fit`$"):
        make_method("fitted")
    with pytest.raises(UsageError, match=r"^lambda: method 'fitted' uses coefficients instead, got 0.5; leave it out"):
        make_method("fitted", 0.5, coefficients=one)
    with pytest.raises(UsageError, match=r"^coefficients: belong to method 'fitted', found 'paper'"):
        make_method("paper", 0.5, coefficients=one)
    for no_number in (None, True, float("nan"), -float("inf")):
        with pytest.raises(UsageError, match=f"^lambda must be a finite number, got {no_number}$"):
            METHODS["paper"](no_number, amplify=True)


def test_a_set_is_selected_by_what_it_keeps() -> None:
    assert made(0.9).select().keep == 0.9
    assert made(0.95, 0.9).select(0.9).keep == 0.9
    assert made(1 / 3, 2 / 3).select(float("0.333333")).keep == 1 / 3, "as tables and commands have it"
    with pytest.raises(
        UsageError, match=r"^keep: expected one of 0.95, 0.9, the 2 sets of coefficients in coefficients; choose one$"
    ):
        made(0.95, 0.9).select()
    with pytest.raises(
        UsageError, match=r"^coefficients: holds no coefficients that keep 0.8; the shares in it are 0.9$"
    ):
        made(0.9).select(0.8)


def test_digests_tell_coefficients_apart() -> None:
    assert made(0.9).select().digest == made(0.9).select().digest
    assert made(0.9).select().digest != made(0.8).select().digest


def test_the_file_holds_them_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "some" / "where" / "c.safetensors"
    coefficients = made(0.95, 0.9)
    coefficients.save(path)
    stored = load_file(path)
    assert stored["a.weight.coefficients"].shape == (2, 2)
    assert stored["a.weight.singular_values"].tolist() == [3.0, 2.0]
    read = load_coefficients(path)
    assert read.facts == FACTS
    assert read.keeps == [0.95, 0.9]
    for one, other in zip(read.sets, coefficients.sets, strict=True):
        assert one.digest == other.digest
        assert one.matrices["b.weight"].singular_values.tolist() == [1.5]
    again = tmp_path / "again.safetensors"
    read.save(again)
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match=r"2 sets of coefficients in .*c.safetensors"):
        read.select()


def test_saving_replaces_coefficients_alone_and_if_asked(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    made(0.9).save(path)
    with pytest.raises(OutputExistsError, match=r"exists; choose another output, or pass overwrite=True$"):
        made(0.8).save(path)
    made(0.8).save(path, overwrite=True)
    assert load_coefficients(path).keeps == [0.8]
    other = tmp_path / "weights.safetensors"
    save_file({"x": np.zeros(3)}, other)
    with pytest.raises(OutputExistsError, match=r"is not coefficients, which is all that is replaced"):
        made(0.8).save(other, overwrite=True)


def spoiled(path: Path, arrays: dict[str, Any], **changes: Any) -> None:
    """Write coefficients with other arrays or facts, under a digest that fits them."""
    import json

    from safetensors import safe_open

    made(0.9).save(path)
    with safe_open(path, "np") as f:
        metadata = f.metadata()
    tree = json.loads(metadata[FIT.key])
    kept = {name: array for name, array in {**load_file(path), **arrays}.items() if array is not None}
    save_file(kept, path, {**metadata, FIT.key: json.dumps({**tree, **changes})})
    path.write_bytes(sealed(path.read_bytes()))


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"a.weight.coefficients": np.array([[np.nan, 1.0]])}, {}, "'a.weight' has a coefficient that is NaN or outside"),
    ({"a.weight.coefficients": np.array([[1.5, 1.0]])}, {}, r"'a.weight' has a coefficient that is NaN or outside"),
    ({"a.weight.coefficients": np.array([[0.5]])}, {}, r"'a.weight' has \[2\] singular values, and coefficients of shape \[1, 1\]"),
    ({"a.weight.singular_values": np.array([2.0, 3.0])}, {}, "not finite and in descending order"),
    ({"a.weight.singular_values": None}, {}, "lacks 'a.weight.singular_values'"),
    ({"b.weight.coefficients": np.zeros((1, 1), np.float32)}, {}, "'b.weight.coefficients' is not F64"),
    ({"other": np.zeros(1)}, {}, "not pairs of singular values and coefficients"),
    ({}, {"schema": "streamer.coefficients/2"}, "another version: expected streamer.coefficients/3, found 'streamer.coefficients/2'"),
    ({}, {"keeps": [2]}, "keeps are not different shares"),
    ({}, {"keeps": [0.9, 0.9000001]}, "keeps are not different shares"),
    ({}, {"keeps": []}, "keeps are not different shares"),
    ({}, {"keeps": "0.9"}, "keeps are not different shares"),
]  # fmt: skip


@pytest.mark.parametrize(("arrays", "changes", "message"), BAD)
def test_a_file_that_is_not_whole_is_refused(
    tmp_path: Path, arrays: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "c.safetensors"
    spoiled(path, arrays, **changes)
    with pytest.raises(FormatError, match=message):
        load_coefficients(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(
        FormatError,
        match=r"expected coefficients \(streamer.coefficients/3\), found another",
    ):
        load_coefficients(path)
    save_file({"x": np.zeros(3)}, path, {"findings": "{}"})
    with pytest.raises(FormatError, match=r"found findings; make coefficients with `streamer fit`"):
        load_coefficients(path)
    with pytest.raises(FormatError, match=r"found a directory; name the file in it"):
        load_coefficients(tmp_path)

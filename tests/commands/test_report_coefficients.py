"""`streamer report` with coefficients: what they leave of the intruders."""

from __future__ import annotations

from pathlib import Path

import fitted
import helpers
import pytest
from forks import server
from test_schemas import check

import streamer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, its adapter, and coefficients of two shares, which leave the first matrix as it is."""
    home = tmp_path_factory.mktemp("fitted")
    base, adapter = helpers.three_shards(home)
    return base, adapter, fitted.coefficients_file(home / "c.safetensors", base, adapter, 0.95, 0.9, unchanged=1)


def test_a_report_says_what_is_left_of_the_intruders(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, file = inputs
    path = tmp_path / "f.safetensors"
    findings = streamer.detect_intruder_dimensions(base, adapter, path)
    line = ("report", path, base, adapter, "--coefficients", file, "--keep", "0.9")
    tree = check(server().run(*line, "--json"), "streamer.findings/1")
    coefficients = streamer.load_coefficients(file)
    assert tree == streamer.report_coefficients(path, base, adapter, coefficients, keep=0.9)
    one, total = coefficients.select(0.9), tree["totals"]["coefficients"]
    assert (total["keep"], total["sha256"]) == (0.9, one.digest)
    energy = {row["tensor"]: row["delta_norm"] ** 2 for row in tree["matrices"]}
    means = sum(row["coefficients"]["mean"] * energy[row["tensor"]] for row in tree["matrices"]) / sum(energy.values())
    assert total["mean"] == pytest.approx(means, rel=1e-4)
    for row in tree["matrices"]:
        assert len(row["coefficients"]["intruders"]) == len(row["intruders"])
        matrix = one.matrices[row["tensor"]]
        assert all(matrix.values.min() <= c <= matrix.values.max() for c in row["coefficients"]["intruders"])
    assert tree["matrices"][0]["coefficients"] == {
        "mean": pytest.approx(1),
        "intruders_mean": pytest.approx(1),
        "intruders": [pytest.approx(1)] * len(findings[0].detection.intruders),
    }
    text = server().run(*line).out
    assert {"c intr.", "c all"} <= {word.strip() for word in text.splitlines()[0].split("  ")}
    assert (
        f"the coefficients to keep 90% leave {total['mean']:.2f} of the delta and {total['intruders_mean']:.2f} of the intruders in it"
        in text
    )
    plain = check(server().run("report", path, "--json"), "streamer.findings/1")
    assert plain == findings.record() | {"matrices": plain["matrices"], "totals": plain["totals"]}
    assert "coefficients" not in plain["totals"]


def test_reports_that_are_refused(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, file = inputs
    path, keep = tmp_path / "f.safetensors", ("--keep", "0.9")
    streamer.detect_intruder_dimensions(base, adapter, path)
    other_base, other = helpers.three_shards(tmp_path / "other", hidden=64)
    together = "streamer: report: expected --coefficients, BASE and ADAPTER together; as `streamer report FINDINGS BASE ADAPTER"
    cases: list[tuple[int, tuple[object, ...], str]] = [
        (2, ("--coefficients", file), together),
        (2, (base, adapter), together),
        (2, (base, "--coefficients", file), together),
        (2, keep, together),
        (
            2,
            (base, adapter, "--coefficients", file),
            "--keep: expected one of 0.95, 0.9, the 2 sets of coefficients in ",
        ),
        (3, (other_base, other, "--coefficients", file, *keep), "f.safetensors: made with another base"),
        (
            3,
            (base, adapter, "--coefficients", path),
            "expected coefficients (streamer.coefficients/3), found findings",
        ),
    ]
    for code, options, words in cases:
        done = server().run("report", path, *options)
        assert (done.code, done.out) == (code, ""), done
        assert done.err.count("\n") == 1
        assert words in done.err

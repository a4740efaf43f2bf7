"""Outputs by the factors of a fit: what stands in them, what is there already, and what is refused before anything is written."""

import shutil
from pathlib import Path
from typing import Any

import fitted
import helpers
import pytest
import torch
from commands import refuse
from forks import server
from test_schemas import check
from verified import edit_tensor

import streamer
from streamer.errors import UsageError
from streamer.methods.files import FIT


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, its adapter, and factors."""
    home = tmp_path_factory.mktemp("fitted")
    base, adapter = helpers.three_shards(home)
    return base, adapter, fitted.coefficients_file(home / "c.safetensors", base, adapter)


# What is written --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["mitigate", "merge"])
def test_an_output_says_how_it_was_made(
    inputs: tuple[Path, Path, Path], tmp_path: Path, command: str
) -> None:
    base, adapter, file = inputs
    out = tmp_path / "out"
    line = (command, base, adapter, "-o", out, "--coefficients", file)
    check(server().run(*line, "--dry-run", "--json"), "streamer.dry-run/1")
    record = check(server().run(*line, "--json"), "streamer.output/2")
    one = streamer.load_coefficients(file)
    assert (record["method"], record["lambda"], record["detection"]) == ("regmean", None, None)
    assert record["coefficients"] == {"keep": 0.9, "sha256": one.digest}
    assert (record["totals"]["changed"], record["totals"]["intruders"]) == (9, 0)
    assert record["totals"]["dropped_max"] < 1e-6
    (shard, *_) = out.glob("*.safetensors")
    assert helpers.stamp(shard)["coefficients"] == record["coefficients"]
    assert record["file"] == "c.safetensors"
    assert "--coefficients c.safetensors" in (out / "README.md").read_text()
    # `--method regmean` says no more than the coefficients do, and a λ of another run stands in the way of nothing.
    assert (
        check(server().run(*line, "--method", "regmean", "--json"), "streamer.output/2")["state"]
        == "present"
    )
    other = fitted.coefficients_file(tmp_path / "c.safetensors", base, adapter, 0.95)
    line = (command, base, adapter, "-o", out, "--coefficients", other)
    done = server().run(*line)
    assert done.code == 4
    assert "holds another output" in done.err
    again = check(server().run(*line, "--overwrite", "--json"), "streamer.output/2")
    assert again["coefficients"]["keep"] == 0.95
    text = server().run(*line).out
    assert "method regmean, to keep 95% of the learning: 9 of 9 matrices mitigated" in text


def test_a_fitted_adapter_is_known_as_mitigated(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, file = inputs
    streamer.reduce_intruder_dimension(base, adapter, tmp_path / "a", coefficients=file)
    with pytest.warns(
        streamer.StreamerWarning,
        match="mitigated already, by `streamer mitigate` with method regmean:",
    ):
        streamer.reduce_intruder_dimension(base, tmp_path / "a", tmp_path / "b", method="shrink")


# Refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["mitigate", "merge"])
def test_refusals(inputs: tuple[Path, Path, Path], tmp_path: Path, command: str) -> None:
    base, adapter, file = inputs
    home = tmp_path / "home"
    files = tmp_path / "files"
    home.mkdir()
    files.mkdir()
    streamer.detect_intruder_dimensions(base, adapter, findings := files / "f.safetensors")
    (other := files / "other").mkdir()
    other_base, other_adapter = helpers.three_shards(other, hidden=64)
    of_other = fitted.coefficients_file(files / "other.safetensors", other_base, other_adapter)
    tuned = Path(shutil.copytree(adapter, files / "tuned"))
    edit_tensor(
        tuned / "adapter_model.safetensors",
        "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight",
        lambda t: t.mul_(2),
    )
    of_tuned = fitted.coefficients_file(files / "tuned.safetensors", base, tuned)

    def another_base(tree: dict[str, Any], arrays: dict[str, torch.Tensor]) -> None:
        tree["base"]["files"][0]["sample_sha256"] = "0" * 64

    def nothing(tree: dict[str, Any], arrays: dict[str, torch.Tensor]) -> None:
        del tree["base"]

    cases: list[tuple[int, list[object], str]] = [
        (
            3,
            [findings],
            f"{findings}: expected coefficients (streamer.coefficients/3), found findings; make",
        ),
        (
            3,
            [adapter / "adapter_model.safetensors"],
            "found another safetensors file; make coefficients with `streamer repair`",
        ),
        (3, [files / "none.safetensors"], "none.safetensors: no such file"),
        (3, [of_other], f"streamer: {of_other}: coefficients of another base ("),
        (
            3,
            [of_tuned],
            f"streamer: {of_tuned}: coefficients of another adapter (weights_sha256 differ); give the",
        ),
        (
            3,
            [helpers.tampered(file, files / "base", FIT.key, another_base)],
            "of another base (the content of model-00001-of-",
        ),
        (
            3,
            [helpers.tampered(file, files / "no", FIT.key, nothing)],
            "do not say which base they were fitted to",
        ),
        (
            2,
            [file, "--lambda", "0.5"],
            "--lambda: method 'regmean' has no such option; leave it out",
        ),
        (
            2,
            [file, "--lambda", "0.75"],
            "--lambda: method 'regmean' has no such option; leave it out",
        ),
        (2, [file, "--method", "project"], "--coefficients: method 'project' has no such option"),
    ]
    for code, options, words in cases:
        line = refuse(command, base, adapter, home, code, "--coefficients", *options)
        assert words in line, line
    line = refuse(command, base, adapter, home, 3, "--findings", file)
    assert line == (
        f"streamer: {file}: expected findings (streamer.findings/1), found coefficients; pass them with --coefficients (coefficients=), "
        "and make findings with `streamer detect`\n"
    )
    words = "streamer: method 'regmean' needs coefficients; make them with `streamer repair`\n"
    assert refuse(command, base, adapter, home, 2, "--method", "regmean") == words


def test_factors_that_are_not_finite_are_refused_in_memory_too(
    inputs: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, file = inputs
    made = streamer.load_coefficients(file)
    next(iter(made.matrices.values()))[0, 0] = float("nan")
    with pytest.raises(
        UsageError, match="is not a matrix of finite numbers; use the factors of a fit"
    ):
        streamer.reduce_intruder_dimension(base, adapter, tmp_path / "out", coefficients=made)
    with pytest.raises(
        UsageError, match="is not a matrix of finite numbers; use the factors of a fit"
    ):
        made.save(tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_several_adapters_take_none(inputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, file = inputs
    two = Path(shutil.copytree(adapter, tmp_path / "two"))
    done = server().run("merge", base, adapter, two, "-o", tmp_path / "out", "--coefficients", file)
    assert done.code == 2
    assert done.err == (
        f"streamer: {file}: coefficients belong to one adapter, found 2: adapter, two; take them one at a time, each with its own\n"
    )
    assert not (tmp_path / "out").exists()

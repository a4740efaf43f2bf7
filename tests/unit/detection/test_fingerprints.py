"""Fingerprints tell matrices apart by the values that they are judged by, and by nothing else."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import three_shards
from safetensors.torch import load_file, save_file

import streamer
from streamer.detection.findings import Findings
from streamer.detection.fingerprints import fingerprint, matched_findings
from streamer.errors import MismatchError
from streamer.plan.plan import Plan, make_plan


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return three_shards(tmp_path_factory.mktemp("inputs"))


def prints(plan: Plan) -> list[str | None]:
    return [fingerprint(plan, target) for target in plan.targets]


def findings(base: Path, adapter: Path) -> Findings:
    return streamer.detect_intruder_dimensions(base, adapter)


def test_a_wider_dtype_and_other_shards_keep_it(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    tensors = {name: t.double() for shard in sorted(base.glob("*.safetensors")) for name, t in load_file(shard).items()}
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    if (base / "config.json").exists():
        shutil.copy(base / "config.json", tmp_path / "one")
    before, after = make_plan(base, adapter), make_plan(tmp_path / "one", adapter)
    assert {t.tensor: p for t, p in zip(before.targets, prints(before), strict=True)} == {
        t.tensor: p for t, p in zip(after.targets, prints(after), strict=True)
    }


def test_another_value_of_the_adapter_changes_it(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, other / "adapter_model.safetensors", metadata={"format": "pt"})
    mine, others = prints(make_plan(base, adapter)), prints(make_plan(base, other))
    assert sum(a != b for a, b in zip(mine, others, strict=True)) == 1


def test_findings_are_matched_by_module_and_values(inputs: tuple[Path, Path]) -> None:
    base, adapter = inputs
    found, plan = findings(base, adapter), make_plan(base, adapter)
    assert [m.fingerprint for m in found] == prints(plan)
    elsewhere = replace(found, matrices=tuple(replace(m, tensor=f"elsewhere.{m.tensor}") for m in found))
    assert matched_findings(plan, elsewhere, "findings") == found
    with pytest.raises(MismatchError, match="has no findings on 1 of"):
        matched_findings(plan, found[1:], "findings")
    first = replace(found[0], fingerprint="0" * 64)
    with pytest.raises(MismatchError, match="was judged with other values"):
        matched_findings(plan, replace(found, matrices=(first, *found.matrices[1:])), "findings")
    with pytest.raises(MismatchError, match="does not say by which values"):
        matched_findings(plan, replace(found, matrices=(replace(first, fingerprint=None), *found.matrices[1:])), "f")

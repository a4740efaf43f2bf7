"""Detection in several adapters on one base gives byte for byte what each alone gives, and an error names its adapter."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers import tree_digest
from safetensors.torch import load_file, save_file
from two_matrices import OPTIONS, SHAPES, make_adapter, make_adapters, make_base

import streamer
from streamer.detection.findings import Findings
from streamer.errors import NumericError
from streamer.linalg.torch_state import threads

COUNT = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_adapters(tmp_path_factory.mktemp("adapters"), COUNT)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads():
        yield


def detect(base: Path, adapters: list[Path], *args: Any, **options: Any) -> dict[str, Findings]:
    return streamer.detect_intruder_dimensions(base, adapters, *args, **{**OPTIONS, **options})


def detect_alone(base: Path, adapter: Path, *args: Any, **options: Any) -> Findings:
    return streamer.detect_intruder_dimensions(base, adapter, *args, **{**OPTIONS, **options})


def test_findings_are_byte_for_byte_those_of_each_alone(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    some = [*adapters, make_adapter(tmp_path / "in" / "one", 8, modules=["a.1"])]
    for adapter in some:
        detect_alone(base, adapter, tmp_path / "alone" / f"{adapter.name}.safetensors")
    detect(base, some, tmp_path / "together")
    with ThreadPoolExecutor(2) as pool:
        detect(base, some, tmp_path / "workers", executor=pool)
    assert tree_digest(tmp_path / "together") == tree_digest(tmp_path / "alone") == tree_digest(tmp_path / "workers")


def test_findings_that_are_missing_are_made_and_the_others_stay(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    detect(base, adapters[:3], out)
    expected, before = tree_digest(out), (out / "n0.safetensors").stat().st_ino
    (out / "n1.safetensors").unlink()
    detect(base, adapters[:3], out)
    assert (out / "n0.safetensors").stat().st_ino == before
    assert tree_digest(out) == expected


def test_progress_names_each_adapter_and_seconds_add_up(base: Path, adapters: list[Path]) -> None:
    events = []
    found = streamer.detect_intruder_dimensions(base, adapters, on_event=events.append, **OPTIONS)
    steps = [e for e in events if e.stage == "detect"]
    names = [(f"{module}.weight", adapter.name) for module in SHAPES for adapter in adapters]
    assert [(e.name, e.adapter) for e in steps[:-1]] == names
    assert [e.items for e in steps] == list(range(len(names) + 1))
    assert [e.done for e in steps] == sorted(e.done for e in steps)
    assert all(m.seconds for findings in found.values() for m in findings)


def test_an_error_names_its_adapter(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    bad = Path(shutil.copytree(adapters[1], tmp_path / "bad"))
    tensors = load_file(bad / "adapter_model.safetensors")
    tensors["base_model.model.a.1.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, bad / "adapter_model.safetensors", metadata={"format": "pt"})
    events, out = [], tmp_path / "out"
    with pytest.raises(NumericError, match=r"module 'a.1': lora_A holds NaN or Inf") as e:
        detect(base, [adapters[0], bad, adapters[2]], out, on_event=events.append)
    assert str(e.value).startswith(f"{bad / 'adapter_model.safetensors'}: tensor 'a.1.weight' with ")
    assert [(e.name, e.adapter) for e in events][-2:] == [("a.1.weight", "n0"), ("a.1.weight", "bad")]
    assert not list(out.glob("*.safetensors"))


def test_an_error_of_the_base_names_the_base(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    bad = Path(shutil.copytree(base, tmp_path / "bad"))
    (shard,) = bad.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["a.1.weight"][0, 0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    for several in (adapters[:3], adapters[:1]):
        with pytest.raises(NumericError, match=rf"^{shard}: tensor 'a.1.weight' .* the base matrix"):
            detect(bad, several)

"""Three adapters and more on one matrix share the products with it: fewer products, the same decisions, and the same bytes each time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tree_digest
from safetensors.torch import load_file, save_file
from sharing import OPTIONS, SHAPES, make_adapter, make_adapters, make_base, make_dora

import streamer
from streamer.detection.findings import Findings
from streamer.errors import Interrupted, NumericError
from streamer.events import Monitor
from streamer.linalg import operators
from streamer.linalg.torch_state import threads

COUNT = 10


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


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns of the products with the base's matrices, as they are made."""
    made, product = [], operators.skinny_product

    def noted(M: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        made.append(X.shape[1])
        return product(M, X)

    monkeypatch.setattr(operators, "skinny_product", noted)
    return made


def detect(base: Path, adapters: list[Path], *args: Any, **options: Any) -> dict[str, Findings]:
    return streamer.detect_intruder_dimensions(base, adapters, *args, **{**OPTIONS, **options})


def detect_alone(base: Path, adapter: Path, *args: Any, **options: Any) -> Findings:
    return streamer.detect_intruder_dimensions(base, adapter, *args, **{**OPTIONS, **options})


def weights(base: Path) -> dict[str, torch.Tensor]:
    (shard,) = base.glob("*.safetensors")
    return {name: t.double() for name, t in load_file(shard).items()}


def test_decisions_are_those_of_each_alone_and_hold_for_the_dense_svd(base: Path, adapters: list[Path]) -> None:
    together, intruders = detect(base, adapters), 0
    for adapter in adapters:
        alone = detect_alone(base, adapter)
        factors = load_file(adapter / "adapter_model.safetensors")
        for one, shared in zip(alone, together[adapter.name], strict=True):
            a, b = one.detection, shared.detection
            assert (a.intruders, a.certified, a.solver, a.degenerate) == (
                b.intruders,
                b.certified,
                b.solver,
                b.degenerate,
            )
            assert b.certified
            intruders += len(b.intruders)
            W0 = weights(base)[one.tensor]
            stem = f"base_model.model.{one.tensor.removesuffix('.weight')}.lora_"
            W = W0 + factors[f"{stem}B.weight"].double() @ factors[f"{stem}A.weight"].double()
            U0, U = (torch.linalg.svd(matrix, full_matrices=False).U for matrix in (W0, W))
            similarity = (U0.T @ U[:, : len(b.similarity)]).abs().amax(0).tolist()
            for true, low, high in zip(similarity, b.similarity_low, b.similarity_high, strict=True):
                assert low <= true <= high
    assert intruders > COUNT


def test_products_are_made_together(base: Path, adapters: list[Path], products: list[int]) -> None:
    detect_alone(base, adapters[0])
    alone, widest = len(products), max(products)
    products.clear()
    detect(base, adapters)
    assert max(products) == 5 * widest  # in two groups of five
    assert len(products) < 3 * alone
    products.clear()
    detect(base, adapters[:2])
    assert max(products) == widest


def test_two_are_byte_for_byte_what_each_alone_gives(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    detect(base, adapters[:2], tmp_path / "two")
    for adapter in adapters[:2]:
        detect_alone(base, adapter, tmp_path / f"{adapter.name}.safetensors")
        path = tmp_path / f"{adapter.name}.safetensors"
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_same_adapters_give_the_same_bytes(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    some = [
        *adapters[:4],
        make_dora(tmp_path / "in" / "dora", 7),
        make_adapter(tmp_path / "in" / "one", 8, modules=["a.1"]),
    ]
    for name in ("first", "again"):
        detect(base, some, tmp_path / name)
    assert tree_digest(tmp_path / "first") == tree_digest(tmp_path / "again")
    with ThreadPoolExecutor(2) as pool:
        detect(base, some, tmp_path / "workers", executor=pool)
    assert tree_digest(tmp_path / "first") == tree_digest(tmp_path / "workers")
    detect_alone(base, some[4], tmp_path / "dora.safetensors")  # which shares with nobody
    assert (tmp_path / "dora.safetensors").read_bytes() == (tmp_path / "first" / "dora.safetensors").read_bytes()


def test_a_merge_shares_products_too(base: Path, adapters: list[Path], tmp_path: Path, products: list[int]) -> None:
    some, merge = adapters[:3], streamer.merge_with_reduced_intruder_dimensions
    found = detect(base, some)
    widest = max(products)
    products.clear()
    merge(base, some, tmp_path / "own", mitigation_lambda=0.5, **OPTIONS)
    assert max(products) == widest
    merge(base, some, tmp_path / "given", mitigation_lambda=0.5, findings=found)
    for adapter in some:
        own, given = (next((tmp_path / name / adapter.name).glob("*.safetensors")) for name in ("own", "given"))
        tensors = load_file(given)
        assert all(torch.equal(t, tensors[name]) for name, t in load_file(own).items())


def test_of_a_group_one_of_whose_findings_are_missing_the_others_stay(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    detect(base, adapters[:3], out)
    expected, before = tree_digest(out), (out / "n0.safetensors").stat().st_ino
    (out / "n1.safetensors").unlink()
    alone = detect(base, adapters[:3], out)["n1"]
    assert (out / "n0.safetensors").stat().st_ino == before
    del expected["n1.safetensors"]
    assert expected.items() <= tree_digest(out).items()
    assert alone.digest() == detect_alone(base, adapters[1]).digest()


def test_progress_names_each_adapter_and_seconds_add_up(base: Path, adapters: list[Path]) -> None:
    events = []
    found = streamer.detect_intruder_dimensions(base, adapters[:4], on_event=events.append, **OPTIONS)
    steps = [e for e in events if e.stage == "detect"]
    names = [(f"{module}.weight", adapter.name) for module in SHAPES for adapter in adapters[:4]]
    assert [(e.name, e.adapter) for e in steps[:-1]] == names
    assert [e.items for e in steps] == list(range(len(names) + 1))
    assert [e.done for e in steps] == sorted(e.done for e in steps)
    assert all(m.seconds for findings in found.values() for m in findings)


def test_what_needs_the_dense_solver_or_float64_gets_it_alone(base: Path, adapters: list[Path]) -> None:
    """A threshold next to a similarity: float32 does not settle that direction, nor bounds those of others that are less close."""
    every = {("certified", "float32"), ("dense", "float32"), ("dense", "float64")}
    # Most similarities are near 1: next to a large one every matrix has another, and no bound settles any. The smallest are tried first.
    similarities = sorted(
        s for a in adapters[:4] for m in detect_alone(base, a, solver="dense") for s in m.detection.similarity
    )
    for epsilon in (s + 1e-6 for s in similarities if s > 0.5):
        together, seen = detect(base, adapters[:4], threshold_epsilon=epsilon), set()
        for adapter in adapters[:4]:
            for one, shared in zip(
                detect_alone(base, adapter, threshold_epsilon=epsilon), together[adapter.name], strict=True
            ):
                assert one.detection.intruders == shared.detection.intruders
                assert not one.detection.escalated or one == shared
                seen.add((shared.detection.solver, shared.detection.precision))
        if seen == every:
            break
    assert seen == every


def test_an_error_names_its_adapter_and_those_before_it_stand(base: Path, adapters: list[Path], tmp_path: Path) -> None:
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


def test_a_stop_comes_between_two_products(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect(base, adapters[:4], tmp_path / "whole")
    monitor, product, made = Monitor(), operators.skinny_product, []

    def stopping(M: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        made.append(X)
        if len(made) == 9:
            monitor.request_stop(2)
        return product(M, X)

    with monkeypatch.context() as patch:
        patch.setattr(operators, "skinny_product", stopping)
        with pytest.raises(Interrupted):
            detect(base, adapters[:4], tmp_path / "out", monitor=monitor)
    assert len(made) == 9
    detect(base, adapters[:4], tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "whole")

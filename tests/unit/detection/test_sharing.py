"""Who shares products with whom: three and more that the certified solver begins with, as many at once as memory holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from sharing import SHAPES, make_adapter, make_adapters, make_base, make_dora

from streamer.detection.memory import best_way, detection_bytes
from streamer.detection.options import DetectionOptions
from streamer.detection.sharing import TOGETHER, share, sharing_memory
from streamer.plan.batch import Batch
from streamer.plan.memory import resident_bytes
from streamer.plan.plan import make_batch

CPU = torch.device("cpu")
CERTIFIED = DetectionOptions(solver="certified")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_adapters(tmp_path_factory.mktemp("adapters"), 2 * TOGETHER + 1)


def groups(
    batch: Batch,
    options: DetectionOptions = CERTIFIED,
    counts: Sequence[int] = (),
    matrix: int = 0,
    device: str = "cpu",
) -> list[list[int]]:
    """The numbers of the plans that share the products with a matrix."""
    counts = counts or [1] * len(batch.plans)
    uses = batch.matrices()[matrix]
    found = share(batch.plans, uses, options, torch.device(device), resident_bytes(batch), counts)
    return [[i for i, _ in group] for group in found]


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (2, [1, 1]), (3, [3]), (8, [8]), (9, [4, 5]), (10, [5, 5]), (17, [5, 6, 6])]
)
def test_three_and_more_share_and_eight_at_once(base: Path, adapters: list[Path], count: int, sizes: list[int]) -> None:
    found = groups(make_batch(base, adapters[:count]))
    assert [len(group) for group in found] == sizes
    assert [i for group in found for i in group] == list(range(count))


def test_the_others_are_alone(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one", 30, modules=["a.1"])
    mixed = [adapters[0], make_dora(tmp_path / "dora", 31), one, *adapters[1:3]]
    assert groups(make_batch(base, mixed)) == [[0, 3, 4], [1]]
    assert groups(make_batch(base, mixed), matrix=1) == [[0, 2, 3, 4], [1]]
    assert groups(make_batch(base, mixed), counts=[1, 1, 1, 2, 2]) == [[0], [1], [3, 4]]
    assert groups(make_batch(base, mixed), device="cuda") == [[0], [1], [3], [4]]


@pytest.mark.parametrize(
    "options", [DetectionOptions(), DetectionOptions(solver="dense"), DetectionOptions(solver="certified", top_k=195)]
)
def test_the_dense_solver_shares_nothing(base: Path, adapters: list[Path], options: DetectionOptions) -> None:
    batch = make_batch(base, adapters[:4])
    assert groups(batch, options) == [[0], [1], [2], [3]]
    assert sharing_memory(batch, options, CPU, 0) == [{}] * 4


def test_memory_cuts_groups_and_leaves_each_its_own_way(base: Path, adapters: list[Path]) -> None:
    batch = make_batch(base, adapters[:6])
    resident = resident_bytes(batch)
    whole = max(memory.peak for memory in sharing_memory(batch, CERTIFIED, CPU, resident)[0].values())
    targets = batch.plans[0].targets
    alone = max(min(detection_bytes(batch.plans[0], t, CERTIFIED, resident).values()) for t in targets)
    seen = []
    for budget in range(alone, whole + 2, (whole - alone) // 40):
        options = DetectionOptions(solver="certified", max_memory=budget)
        sizes = [len(group) for group in groups(batch, options)]
        assert sum(sizes) == 6
        assert max(sizes) - min(sizes) <= 1
        for memory in sharing_memory(batch, options, CPU, resident)[0].values():
            assert memory.peak <= budget
        for target in targets if max(sizes) > 1 else ():
            way = best_way(batch.plans[0], target, options, resident)
            assert way == best_way(
                batch.plans[0],
                target,
                options,
                resident + max(memory.held for memory in sharing_memory(batch, options, CPU, resident)[0].values()),
            )
        seen.append(max(sizes))
    assert {1, 2, 3, 6} <= set(seen)


def test_estimates_name_the_tensors_that_are_shared(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one", 30, modules=["a.1"])
    first, _, alone = sharing_memory(make_batch(base, [*adapters[:2], one]), CERTIFIED, CPU, 0)
    assert list(first) == list(alone) == ["a.1.weight"]
    assert first == alone
    assert set(first) < {f"{name}.weight" for name in SHAPES}

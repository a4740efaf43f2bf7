"""Findings on another base than the adapter was trained on are recognised; those on its own base, or that trained further, are not."""

import json
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from forks import server
from safetensors.torch import save_file
from seeds import vary

import streamer
from streamer.detection.findings import ALPHA, random_overlap

M = 160
MATRICES = 8
STRONG = 3
SAYS = "this looks like another base"


def test_few_random_vectors_are_closer_than_the_bound() -> None:
    """Sampled: it is valid, and no looser than the union bound and the sample make it."""
    numbers = np.random.default_rng(vary(0))
    for m, n in ((300, 300), (300, 50)):
        vectors = numbers.standard_normal((40_000, m))
        largest = np.abs(vectors[:, : min(m, n)]).max(1) / np.linalg.norm(vectors, axis=1)
        share = (largest > random_overlap((m, n))).mean()
        assert ALPHA / 1.3 < share < ALPHA * 1.3


def write_base(directory: Path, seed: int, more: float = 0.0) -> Path:
    """A base of a seed; with as much of another as a further training adds."""
    tensors = {}
    for i in range(MATRICES):
        W = helpers.power_law(M, M, seed=100 * seed + i) + more * helpers.power_law(
            M, M, seed=900 + i
        )
        tensors[f"layers.{i}.weight"] = W.float()
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three bases, and adapters: one whose strong directions lean to its base's, as training makes them, and one with a planted one."""
    home = tmp_path_factory.mktemp("bases")
    own = write_base(home / "own", 1)
    write_base(home / "further", 1, more=0.2)
    write_base(home / "other", 2)
    factors = {}
    planted = {}
    for i in range(MATRICES):
        W = helpers.power_law(M, M, seed=100 + i)
        g = torch.Generator().manual_seed(vary(i))
        lean = torch.linalg.svd(W).U[:, 4 : 4 + STRONG]
        away = torch.linalg.qr(
            torch.cat([lean, torch.randn(M, STRONG, generator=g, dtype=torch.float64)], 1)
        ).Q
        B = (0.42 * lean + (1 - 0.42**2) ** 0.5 * away[:, STRONG:]) * torch.tensor([3.0, 2.5, 2.0])
        A = torch.linalg.qr(torch.randn(M, STRONG, generator=g, dtype=torch.float64)).Q.T
        factors[f"layers.{i}"] = (A.float(), B.float())
        planted[f"layers.{i}"] = helpers.intruding_factors(M, M, STRONG, seed=i, sigma=3.0)
    helpers.write_adapter(home / "adapter", factors, r=STRONG)
    helpers.write_adapter(home / "planted", planted, r=STRONG)
    assert own.exists()
    return home


@pytest.mark.parametrize("solver", ["dense", "certified"])
@pytest.mark.parametrize(
    ("base", "adapter", "random"),
    [
        ("own", "adapter", False),
        ("further", "adapter", False),
        ("other", "adapter", True),
        ("other", "planted", False),
    ],
)
def test_the_base_of_another_seed_is_recognised(
    home: Path, solver: str, base: str, adapter: str, random: bool
) -> None:
    said: list[str] = []
    found = streamer.detect_intruder_dimensions(
        home / base,
        home / adapter,
        solver=solver,
        on_event=lambda e: said.append(e.name) if e.stage == "warning" else None,
    )
    assert all(len(m.detection.intruders) >= (STRONG if adapter == "adapter" else 1) for m in found)
    assert found.totals["looks_like_another_base"] is random
    assert [text.startswith(SAYS) for text in said] == [True] * random
    assert found[: MATRICES - 1].totals["looks_like_another_base"] is None  # too few to judge


def test_every_command_warns_of_a_random_overlap(home: Path, tmp_path: Path) -> None:
    base = home / "other"
    adapter = home / "adapter"
    path = tmp_path / "f.safetensors"
    done = server().run("detect", base, adapter, "-o", path, "--json", "-q")
    assert json.loads(done.out)["totals"]["looks_like_another_base"] is True
    again = server().run("report", path, "-q")
    merged = server().run("merge", base, adapter, "-o", tmp_path / "out", "--findings", path, "-q")
    for shown in (done, again, merged):
        assert (shown.code, shown.err.count(SAYS)) == (0, 1)

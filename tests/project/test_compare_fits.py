"""The table of what fits leave is made of measured points, and the whole tool runs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import compare_fits
import pytest
import torch
from line_figure import line_figure
from tool_calls import call_tool


def points(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    """Points that keep and leave so much, and leave half as much of the third text's forgetting."""
    return [{"kept": kept, "left": left, "other": left / 2, "kl": left, "same": 0.5} for kept, left in pairs]


AS_IS = {"kept": 1.0, "left": 1.0, "other": 1.0, "kl": 1.0, "same": 0.25}


def test_what_is_left_is_read_off_measured_points() -> None:
    measured = points((0.9, 0.6), (0.8, 0.4), (0.5, 0.1))
    assert compare_fits.interpolated(measured, 0.8) == pytest.approx(0.4)
    assert 0.4 < compare_fits.interpolated(measured, 0.85) < 0.6
    assert 0.6 < compare_fits.interpolated(measured, 0.95) < 1.0
    assert compare_fits.interpolated(measured, 0.8, "other", AS_IS) == pytest.approx(0.2)
    assert 0.25 < compare_fits.interpolated(measured, 0.95, "same", AS_IS) < 0.5
    assert compare_fits.interpolated(measured, 0.4) is None
    assert compare_fits.interpolated([], 0.9) is None
    # What keeps more though it is stronger is left out, and all after it.
    assert compare_fits.interpolated(points((0.9, 0.6), (0.95, 0.2), (0.7, 0.1)), 0.8) is None


def test_the_tables_have_means_and_errors() -> None:
    def one(adapter: str, seed: int, left: float) -> dict:
        found = {method: points((0.9, left), (0.5, 0.1)) for method in compare_fits.COLUMNS}
        found["shrink"] = points((0.9, 2 * left), (0.5, 0.2))
        found["paper"] = points((0.95, 0.9))
        if adapter == "usual":
            found["ties"] = []
        return {"kind": "llama", "adapter": adapter, "seed": seed, "points": found, "as_is": AS_IS}

    results = [one("high", 0, 0.2), one("high", 1, 0.3), one("usual", 0, 0.25)]
    lines = compare_fits.table(results, (0.9,)).splitlines()
    assert lines[2].startswith("| llama | high | 90% | 25 ± 5 | 25 ± 5 | 50 ± 10 |")
    assert lines[3].endswith("| – |")
    rows = {line.split(" | ")[0]: line.split(" | ") for line in compare_fits.means(results, (0.9,)).splitlines()}
    assert rows["| repair"][1:] == ["25", "12", "25", "50", "0.50 |"]
    assert rows["| TIES"][1:] == ["25 (1)", "12 (1)", "25 (1)", "50 (1)", "0.50 (1) |"]
    assert rows["| paper"][1:] == ["–"] * 4 + ["– |"]
    words = compare_fits.kept_on_test(results, (0.9,))
    assert words.startswith(
        "asked to keep 90%, on the test text repair keeps, in percent: 90.0 (90 to 90; 3 of 3 within 2"
    )


def test_peers_are_what_their_papers_say(tmp_path: Path) -> None:
    """A fraction of the directions' norm, of the layers by depth, of the entries: against numpy, and PEFT's own layers."""
    import peer_repairs
    import peft
    from causal_models import CAUSAL, make_adapter, make_base
    from transformers import AutoModelForCausalLM

    cls, base = make_base("llama", tmp_path / "base"), tmp_path / "base"
    adapter = make_adapter(cls, base, tmp_path / "adapter", CAUSAL["llama"][2], r=4, lora_alpha=6)
    found = [one for one in peer_repairs.directions(base, adapter) if ".layers." in one.target.tensor]
    for one, c in zip(found, peer_repairs.lines(found, 0.5), strict=True):
        depth = int(one.target.tensor.split(".layers.")[1].split(".")[0])
        delta = one.delta.L.double() @ one.delta.R.double().T
        torch.testing.assert_close(one.delta.L.double() @ one.weighed(c).T, (0.5 + 0.5 * depth) * delta)
    whole = sum(float((one.S**2).sum()) for one in found)
    left = sum(float((c * one.S**2).sum()) for one, c in zip(found, peer_repairs.dropped(found, 0.8, 0), strict=True))
    assert 0.64 * whole <= left < 0.66 * whole + max(float(one.S[0] ** 2) for one in found)
    c = peer_repairs.operated(torch.tensor([3.0, -0.1, 1.0, 0.5, 0.7]), torch.ones(5))
    assert c[0] == c.max()
    assert c[1] == c.min()
    assert float(c.sum()) == pytest.approx(5.0)
    peer_repairs.by_entries(adapter, "ties", 0.3, tmp_path / "ties", 0)

    def deltas(path: Path) -> dict[str, torch.Tensor]:
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
        return {n: m.get_delta_weight("default") for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}

    before, after = deltas(adapter), deltas(tmp_path / "ties")
    for name, delta in before.items():
        k = int(0.3 * delta.numel())
        least = delta.abs().flatten().sort(descending=True).values[k - 1]
        torch.testing.assert_close(after[name], torch.where(delta.abs() >= least, delta, torch.zeros(())))


def test_lines_are_drawn_within_the_picture() -> None:
    text = line_figure({"one": [(2.0, 0.9), (4.0, 0.5)], "two": [(2.0, 1.2), (8.0, 0.5)]}, "passes", "left")
    root = ET.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}polyline")) == 2
    assert len(root.findall(f"{space}circle")) == 4
    width, height = float(root.get("width")), float(root.get("height"))
    for circle in root.findall(f"{space}circle"):
        assert 0 < float(circle.get("cx")) < width
        assert 0 < float(circle.get("cy")) < height
    words = [t.text for t in root.findall(f"{space}text")]
    assert {"one", "two", "passes", "left", "0.25", "8"} <= set(words)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_is_trained_fitted_measured_and_drawn(tmp_path: Path) -> None:
    arguments = ("--tiny", "--kinds", "llama", "--adapters", "high", "--seeds", 1, "--sequences", 16, "--length", 64)
    done = call_tool("compare_fits", tmp_path / "made", *arguments, "--figure", tmp_path / "tokens.svg")
    assert done.returncode == 0, done.stderr
    assert "| llama | high | 90% |" in done.stdout
    assert "| LiNeS |" in done.stdout
    assert ET.parse(tmp_path / "tokens.svg").getroot().get("width")
    again = call_tool("compare_fits", tmp_path / "made", *arguments)
    assert again.stdout == done.stdout

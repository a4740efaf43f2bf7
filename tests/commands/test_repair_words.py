"""What `streamer repair` measures beside the repair, and what it says of trades and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import Server
from learned import make_learned
from test_schemas import check

import streamer
from streamer.api import repair
from streamer.cli.repair_table import repair_table
from streamer.cli.tables import NO_LIMIT
from streamer.fitting.options import FitOptions, divide
from streamer.measuring.sequences import TextSequences


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_learned(tmp_path_factory.mktemp("repair"), sequences=48)


def texts(home: Path) -> list[object]:
    return ["--general", home / "general.npy", "--task", home / "task.npy"]


@pytest.fixture(scope="module")
def fitted(home: Path) -> Path:
    path = home / "f.safetensors"
    streamer.fit_coefficients(home / "base", home / "adapter", path, general=home / "general.npy", task=home / "task.npy",
                              on_event=lambda event: None)  # fmt: skip
    return path


def figures(row: Any) -> list[float]:
    """List the shares of a model; 0 where one is not defined."""
    return [row[key] or 0.0 for key in ("kept", "top1_kept", "forgetting", "divergence")]


def held_apart(home: Path, directory: Path) -> dict[str, Path]:
    """Write the sequences that a fit holds apart."""
    paths = {name: home / f"{name}.npy" for name in ("general", "task")}
    read = {name: TextSequences.of(np.load(path)) for name, path in paths.items()}
    for name, text in divide(read, paths, FitOptions()).items():
        np.save(directory / f"{name}.npy", np.stack(text.held_out.ids))
    return {name: directory / f"{name}.npy" for name in paths}


def test_a_trade_that_is_not_worth_it_is_not_made(fitted: Path) -> None:
    """What the set gives up of the task is many times what it regains; or what the shrink gives up, which regains a little more."""
    found = streamer.load_coefficients(fitted)
    first: Any = found.facts["sets"][0]
    trade = {
        **first["trade"], "regained": 0.0007, "regained_se": 0.0001, "given_up": 0.017, "given_up_se": 0.002, "worth_it": False,
    }  # fmt: skip
    for kl, chosen in ((-0.01, "adapter"), (0.002, "adapter"), (0.5, "shrink")):
        shrink = {
            **first["shrink"],
            "verdict": "worse" if kl > 0 else "better",
            "kl": kl,
            "kl_se": 0.001,
            "lambda": 0.5,
        }
        facts = {**found.facts, "forgotten": True, "sets": [{**first, "trade": trade, "shrink": shrink}]}
        what, why, made = repair._choice(streamer.Coefficients(found.sets[:1], facts))
        assert what == chosen
        assert (made.mitigation_lambda == 1) == (chosen == "adapter")
        if chosen == "adapter":
            assert why == (
                "the adapter as it is: regmean 0.9 regains 0.0007 ± 0.0001 nats of KL per token of general text and gives up 0.0170 ± "
                "0.0020 of loss on the task's; a written variant regains over 0.5 of what it gives up, by two standard errors"
            )


def test_few_sequences_take_more_errors_to_tell(fitted: Path) -> None:
    """The shrink regains three errors more than it must: enough of many sequences, not of four, of which it takes 3.2."""
    found = streamer.load_coefficients(fitted)
    first: Any = found.facts["sets"][0]
    trade = {
        **first["trade"],
        "regained": 0.0,
        "regained_se": 0.0,
        "given_up": 0.0,
        "given_up_se": 0.0,
        "worth_it": False,
    }
    one = {
        **first,
        "trade": trade,
        "shrink": {**first["shrink"], "verdict": "worse", "kl": 0.03, "kl_se": 0.01, "lambda": 0.5},
    }
    for sequences, chosen in ((64, "shrink"), (4, "adapter")):
        texts = {name: {"held": {"sequences": count}} for name, count in (("general", 64), ("task", sequences))}
        facts = {**found.facts, "forgotten": True, "sets": [one], "texts": texts}
        assert repair._choice(streamer.Coefficients(found.sets[:1], facts))[0] == chosen


def test_the_command_that_follows_measures_what_was_written(home: Path, tmp_path: Path) -> None:
    row: Any = {
        "what": "repair",
        "name": "regmean 0.9",
        "kept": 0.9,
        "top1_kept": 0.8,
        "forgetting": 0.2,
        "divergence": 0.1,
    }
    record: Any = {
        "schema": "streamer.repair/1", "why": "", "rows": [row], "intruders": None, "fit": "o.fit.safetensors", "output": "o",
        "reliable": {"kept": True, "forgetting": True, "top1_kept": True}, "state": "written",
    }  # fmt: skip
    written = streamer.reduce_intruder_dimension(
        home / "base", home / "adapter", tmp_path / "o", method="shrink", mitigation_lambda=0.8125
    )
    for chosen, ends in (
        ("repair", "-o FILE --coefficients o.fit.safetensors"), ("shrink", "-o FILE --method shrink --lambda 0.8125"), ("adapter", None),
    ):  # fmt: skip
        shown = repair_table({**record, "chosen": chosen}, written, ("BASE", "ADAPTER"), NO_LIMIT).splitlines()
        assert [line for line in shown if "streamer evaluate" in line] == [line for line in shown[-1:] if ends]
        assert ends is None or shown[-1].endswith(ends)


def test_a_fit_of_an_earlier_version_has_no_top_1(fitted: Path) -> None:
    found = streamer.load_coefficients(fitted)
    old = {key: value for key, value in found.facts.items() if not key.startswith("top1_")}
    old["sets"] = [{key: value for key, value in old["sets"][0].items() if not key.startswith("top1_")}]
    old["sets"][0]["shrink"] = None
    assert {row["top1_kept"] for row in repair._rows(streamer.Coefficients(found.sets, old))} == {None}
    assert repair._rows(found)[0]["top1_kept"] == 1


def test_intruder_scaling_is_measured_beside_it(server: Server, home: Path, tmp_path: Path) -> None:
    """As evaluate measures the method paper on the same sequences; without intruders a line says so."""
    findings = tmp_path / "f.safetensors"
    line = ["repair", home / "base", home / "adapter", *texts(home)]
    found = streamer.detect_intruder_dimensions(home / "base", home / "adapter", findings, top_k=4)
    assert found.intruders
    tree = check(server.run(*line, "-o", tmp_path / "r", "--findings", findings, "--json"), "streamer.repair/1")
    rows = {row["what"]: row for row in tree["rows"]}
    assert (next(iter(rows)), list(rows)[-2:], rows["intruders"]["name"]) == (
        "adapter",
        ["intruders", "repair"],
        "paper 0.75",
    )
    facts = streamer.load_coefficients(tree["fit"]).facts
    assert facts["intruders"] == tree["intruders"] == found.intruders
    record = json.loads((tmp_path / "r" / "streamer.json").read_text())
    assert [line.split(":")[0] for line in record["measured"][-2:]] == ["paper 0.75", tree["rows"][-1]["name"]]
    alone = check(server.run(*line, "-o", tmp_path / "a", "--json"), "streamer.repair/1")
    for row in alone["rows"]:
        assert figures(rows[row["what"]]) == pytest.approx(figures(row), rel=1e-4)
    assert alone["intruders"] is None
    held = held_apart(home, tmp_path)
    measured = streamer.evaluate_variants(home / "base", home / "adapter", **held, findings=findings, methods=["paper"], lambdas=[0.75],
                                          on_event=lambda event: None)  # fmt: skip
    assert figures(facts["scaling"]) == pytest.approx(figures(measured["paper 0.75"]), rel=1e-4)
    none = tmp_path / "none.safetensors"
    found = streamer.detect_intruder_dimensions(home / "base", home / "adapter", none, top_k=4, threshold_epsilon=1e-6)
    assert found.intruders == 0
    shown = server.run(*line, "-o", tmp_path / "n", "--findings", none)
    assert (
        shown.code,
        "the findings have no intruder: scaling them changes nothing, and was not measured" in shown.out,
    ) == (0, True)
    dashes = [row.split()[-3] for row in shown.out.split("\n\n")[0].splitlines()[2:]]
    why = "top-1 kept is not shown: the adapter's change is too small to measure on this text; more text may help"
    assert (set(dashes) == {"-"}) == (why in shown.out) == (not tree["reliable"]["top1_kept"])
    old: Any = {**tree, "rows": [{**row, "top1_kept": None} for row in tree["rows"]], "reliable": repair.UNKNOWN}
    text = repair_table(old, record, ("base", "adapter"), NO_LIMIT)
    assert "top-1 kept is not shown: the fit is of an earlier version, which did not measure it" in text
    other = server.run(*line, "-o", tmp_path / "r", "--findings", none)
    assert (other.code, "holds coefficients of other inputs or options" in other.err) == (4, True)


def test_an_adapter_that_improves_general_text_is_repaired(server: Server, home: Path, tmp_path: Path) -> None:
    """As on an instruction-tuned base: the loss on general text falls, and the divergence from the base says what is forgotten."""
    ids = np.load(home / "task.npy")
    np.save(tmp_path / "near.npy", ids[::-1])
    line = ["repair", home / "base", home / "adapter", "--task", home / "task.npy", "--general"]
    done = server.run(*line, tmp_path / "near.npy", "-o", tmp_path / "a", "--json")
    tree = check(done, "streamer.repair/1")
    facts = streamer.load_coefficients(tree["fit"]).facts
    assert facts["forgetting"] < 0 < facts["divergence"]
    assert facts["forgotten"]
    assert "no evidence" not in tree["why"]
    same = server.run(*line, home / "task.npy", "-o", tmp_path / "b")
    assert "both texts are the same, so the fit is a shrink, Δ / (1 + mu)" in same.err

"""The fit of `streamer repair` from outside: its forecast, its file, what uses it, and a line for each thing that is wrong."""

import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from command_line import process_mib
from forks import Outcome, Server
from helpers import sealed
from learned import held_apart, make_learned, repaired
from test_schemas import check

import streamer
from streamer.errors import FormatError, MismatchError, OutputExistsError
from streamer.evaluation.curve import against_shrink
from streamer.events import Event
from streamer.fitting.choice import MISSED
from streamer.fitting.fit import SHRINKS
from streamer.fitting.solver import factors_of
from streamer.forecast import START_SECONDS
from streamer.plan.plan import make_plan


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_learned(tmp_path_factory.mktemp("fit"), 24, 32)


SEQUENCES = "--sequences", 24


def run(
    server: Server, home: Path, output: object, *options: object, before: str = "", **inputs: Path
) -> Outcome:
    line = [
        "repair",
        inputs.get("base", home / "base"),
        inputs.get("adapter", home / "adapter"),
        "-o",
        output,
        *SEQUENCES,
        *options,
    ]
    for name in ("general", "task"):
        line += [f"--{name}", inputs.get(name, home / f"{name}.npy")]
    return server.run(*line, before=before)


FIGURES = ("kept", "kept_se", "forgetting", "forgetting_se", "divergence", "divergence_se")


def test_an_adapter_that_saves_a_module_is_not_the_base_without_its_deltas(tmp_path: Path) -> None:
    events: list[Event] = []
    home = make_learned(tmp_path, 24, 32, modules_to_save=["norm"])
    made = repaired(home, tmp_path / "out", sequences=24, on_event=events.append)
    (one,), steps = made.facts["sets"], [event for event in events if event.stage == "fit"]
    assert made.facts["unchanged"][-1] == "model.norm.weight"
    assert (steps[-1].done, steps[-1].items) == (steps[-1].total, steps[-1].of)
    (tmp_path / "held").mkdir()
    found = streamer.evaluate_variants(
        home / "base",
        home / "adapter",
        **held_apart(home, tmp_path / "held"),
        methods=["shrink"],
        lambdas=(*SHRINKS, one["shrink"]["lambda"], 0.0),
        keep=1.0,
        coefficients=made,
        on_event=lambda event: None,
    )
    assert (
        found["shrink 0"]["divergence"] > 1e-3
    )  # a sum of what cannot be negative, whereas differences of losses may cancel
    assert {figure: found["regmean 0.9"][figure] for figure in FIGURES} == pytest.approx(
        {figure: one[figure] for figure in FIGURES}, rel=1e-3
    )
    # A fit knows no shrink of λ 0, which would lose the saved module too.
    variants = tuple(
        replace(v, mitigation_lambda=None) if v.mitigation_lambda == 0 else v
        for v in found.variants
    )
    compared = against_shrink(replace(found, variants=variants), len(variants) - 1)
    assert (compared is None) == (one["shrink"] is None)
    if compared is not None:
        assert one["shrink"]["lambda"] == pytest.approx(compared.mitigation_lambda, abs=0.01)
        assert one["shrink"]["kl"] == pytest.approx(compared.kl.value, rel=1e-2, abs=1e-6)


def test_an_evaluation_warns_of_files_that_were_fitted_to_however_they_are_cut(
    server: Server, home: Path, tmp_path: Path
) -> None:
    output = tmp_path / "c.fit.safetensors"
    others = held_apart(home, tmp_path)
    assert run(server, home, tmp_path / "c").code == 0
    shutil.copy(home / "general.npy", tmp_path / "copied.npy")

    def warnings(**texts: Path) -> list[str]:
        said: list[str] = []
        streamer.evaluate_variants(
            home / "base",
            home / "adapter",
            **{**others, **texts},
            methods=["regmean"],
            coefficients=output,
            sequences=7,
            length=6,
            on_event=lambda event: said.append(event.name) if event.stage == "warning" else None,
        )
        return [
            " ".join(line.split()[:4])
            for line in said
            if "was used to fit the coefficients" in line
        ]

    assert warnings() == []
    assert warnings(general=tmp_path / "copied.npy") == ["the general text, copied.npy,"]
    assert warnings(general=home / "task.npy", task=home / "task.npy") == [
        "the general text, task.npy,",
        "the task text, task.npy,",
    ]


def test_a_dry_run_writes_nothing(server: Server, home: Path, tmp_path: Path) -> None:
    tree = check(run(server, home, tmp_path / "c", "--dry-run", "--json"), "streamer.dry-run/1")
    assert (tree["state"], tree["command"], tree["matrices"]) == ("new", "repair", 8)
    assert list(tmp_path.iterdir()) == []
    run(server, home, tmp_path / "c")
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size / 2 < tree["forecast"]["write_bytes"] < 3 * size
    assert tree["files"] == 1 + sum(
        path.name != "streamer.json" for path in (tmp_path / "c").iterdir()
    )
    assert tree["forecast"]["read_bytes"] > 0
    assert tree["forecast"]["temporary_bytes"] > 0
    assert tree["forecast"]["seconds"] > START_SECONDS, (
        "what every run and every module takes, however small"
    )
    done = check(run(server, home, tmp_path / "c", "--dry-run", "--json"), "streamer.dry-run/1")
    assert (done["state"], done["forecast"]) == ("done", None)


def test_texts_that_are_short_are_told_of_before_the_first_pass(
    server: Server, home: Path, tmp_path: Path
) -> None:
    done = run(
        server, home, tmp_path / "c.safetensors", "--dry-run", "--sequences", 4, "--length", 3
    )
    assert done.code == 0
    *held, line = done.err.splitlines()
    assert "text has 4 tokens to fit on, fewer than the 32 inputs of the widest matrix" in line
    assert line.endswith("; with --sequences 32, the result may forget less")
    assert [line.split(" held-out")[0] for line in held] == [
        f"streamer: warning: the {name} text has 2" for name in ("general", "task")
    ]
    assert "only differences of over 12.7 standard errors are evidence" in held[0]


def test_swapped_texts_are_asked_about(server: Server, home: Path, tmp_path: Path) -> None:
    swapped = {"general": home / "task.npy", "task": home / "general.npy"}
    done = run(server, home, tmp_path / "c.safetensors", "-qq", **swapped)
    assert (done.code, done.out) == (3, "")
    (line,) = done.err.splitlines()
    assert line.startswith(
        "streamer: general.npy: the adapter's loss on the task's text is above the base's, by "
    )
    assert line.endswith(": are the two texts swapped?")
    assert list(tmp_path.iterdir()) == [], "nothing of it is to be taken up"
    events = list[Event]()
    with pytest.raises(MismatchError, match="are the two texts swapped"):
        streamer.repair_adapter(
            home / "base", home / "adapter", tmp_path / "c", on_event=events.append, **swapped
        )
    assert [event.name for event in events].count("embeddings") == 1, "before the sweep that fits"


def test_the_least_budget_that_is_named_is_enough(
    server: Server, home: Path, tmp_path: Path
) -> None:
    output = tmp_path / "c.safetensors"
    refused = run(server, home, output, "--max-memory", budget := f"{process_mib() + 100}M")
    assert (refused.code, refused.out) == (2, "")
    (line,) = refused.err.splitlines()
    assert line.startswith(f"streamer: --max-memory: {budget} is not enough for a sweep of ")
    assert line.endswith("M, and less with a smaller --length or fewer --sequences")
    least = line.partition("it needs ")[2].partition(",")[0]
    tree = check(
        run(server, home, output, "--max-memory", least, "--dry-run", "--json"),
        "streamer.dry-run/1",
    )
    assert 300 << 20 < tree["forecast"]["peak_memory_bytes"] <= int(least.removesuffix("M")) << 20
    assert run(server, home, output, "--max-memory", least, "-qq").code == 0


def test_a_line_for_each_thing_that_is_wrong(server: Server, home: Path, tmp_path: Path) -> None:
    np.save(short := tmp_path / "short.npy", np.zeros(30, int))
    np.save(one := tmp_path / "one.npy", np.full((1, 8), 5))
    cases: list[tuple[list[object], dict[str, Path], int, str]] = [
        ([], {"task": tmp_path / "absent.npy"}, 3, f"{tmp_path}/absent.npy: no such file"),
        (
            ["--length", "8"],
            {"general": short},
            3,
            f"{short}: expected 4 sequences of 8 tokens at least, found 30 tokens; give more text",
        ),
        (
            [],
            {"task": one},
            3,
            f"{one}: expected at least 2 sequences, whose difference gives the error, found 1; give more text",
        ),
        (["--keep", "90"], {}, 2, "--keep: expected a share in (0, 1], found 90.0"),
        (["--mu", "6,1"], {}, 2, "--mu: expected rising numbers above 0, found [6.0, 1.0]"),
        (["--mu", "0"], {}, 2, "--mu: expected rising numbers above 0, found [0.0]"),
        ([], {"adapter": home}, 3, f"{home}: "),
    ]
    for options, inputs, code, message in cases:
        done = run(server, home, tmp_path / "c.safetensors", *options, **inputs)
        assert (done.code, done.out) == (code, ""), (message, done.err)
        (line,) = done.err.splitlines()
        assert message in line
    assert not (tmp_path / "c.safetensors").exists()
    (tmp_path / "n.fit.safetensors").write_text("notes")
    done = run(server, home, tmp_path / "n")
    assert (done.code, done.out) == (4, "")
    assert "exists and is not coefficients, and no other file is replaced" in done.err
    texts = (
        "--task",
        home / "task.npy",
        "--general",
        home / "general.npy",
        "--prompts",
        home / "task.npy",
    )
    done = server.run("repair", home / "base", home / "adapter", *texts, "-o", tmp_path / "c")
    words = "prompts: applies only to text that the adapter writes, found task too; leave one of them out"
    assert (done.code, words in done.err) == (2, True)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_learned(tmp_path_factory.mktemp("inputs"), 48, 32)


def fit(
    home: Path, weights: tuple[float, ...], keep: float, **more: Any
) -> tuple[streamer.Coefficients, int, list[str]]:
    """Fit; return the result, the number of sweeps, and what was said."""
    events: list[Event] = []
    with TemporaryDirectory() as directory:
        made = repaired(
            home,
            Path(directory) / "out",
            keep=keep,
            weights=weights,
            sequences=48,
            length=32,
            on_event=events.append,
            **more,
        )
    steps = [e for e in events if e.stage == "fit"]
    assert [e.done for e in steps] == sorted(e.done for e in steps)
    assert (steps[-1].done, steps[-1].items) == (steps[-1].total, steps[-1].of)
    return (
        made,
        sum(e.name == "embeddings" for e in steps),
        [e.name for e in events if e.stage == "warning"],
    )


def missed(said: list[str]) -> list[str]:
    return [line for line in said if " was to be kept" in line]


def factors(made: streamer.Coefficients) -> dict[str, torch.Tensor]:
    return dict(made.matrices)


def test_the_share_is_a_floor(large: Path) -> None:
    """Candidates that keep it all are told apart by their divergence, and nothing is given away."""
    made, sweeps, said = fit(large, (0.1, 1.0), 0.3)
    (one,) = made.facts["sets"]
    assert (sweeps, missed(said), one["missed"], one["mu"]) == (
        3,
        [],
        False,
        1.0,
    )  # what was learned, fit, shrink
    assert one["kept"] > 0.6
    apart = [fit(large, (mu,), 0.3)[0] for mu in (0.1, 1.0)]
    assert one["divergence"] == min(each.facts["sets"][0]["divergence"] for each in apart)
    assert all(torch.equal(R, factors(apart[1])[name]) for name, R in factors(made).items())


def test_between_two_candidates_factors_are_interpolated(large: Path) -> None:
    """In one further sweep."""
    made, sweeps, said = fit(large, (0.1, 64.0), 0.9)
    assert (sweeps, missed(said)) == (3, [])
    ends = [factors(fit(large, (mu,), 0.001)[0]) for mu in (0.1, 64.0)]
    (one,) = made.facts["sets"]
    assert 0.1 < one["mu"] < 64
    assert (one["missed"], one["kept"] > one["keep"] - MISSED) == (False, True)
    t = np.log(one["mu"] / 0.1) / np.log(640)
    for name, R in factors(made).items():
        torch.testing.assert_close(R, torch.lerp(ends[0][name], ends[1][name], float(t)))
    assert one["divergence"] > fit(large, (0.1, 64.0), 0.7)[0].facts["sets"][0]["divergence"]


def test_if_no_candidate_keeps_the_share_the_adapter_is_an_end(large: Path) -> None:
    made, sweeps, _ = fit(large, (64.0,), 0.9)
    (one,) = made.facts["sets"]
    assert (sweeps, 0 < one["mu"] < 64) == (3, True)
    plan = make_plan(large / "base", large / "adapter")
    end = factors(fit(large, (64.0,), 0.001)[0])
    for target in plan.targets:
        start = factors_of(plan, target).R.float()
        torch.testing.assert_close(
            factors(made)[target.tensor], torch.lerp(start, end[target.tensor], one["mu"] / 64)
        )


def test_a_file_of_another_algorithm_or_a_damaged_one_is_not_this_fit(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.fit.safetensors"

    def again(**options: bool) -> streamer.Coefficients:
        return repaired(large, tmp_path / "f", sequences=24, on_event=lambda event: None, **options)

    with monkeypatch.context() as other:
        other.setattr("streamer.fitting.fit.ALGORITHM", 1)
        assert again().facts == again().facts
    with pytest.raises(OutputExistsError, match="holds coefficients of other inputs or options"):
        again()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(FormatError, match=r"f\.fit\.safetensors: is damaged: expected SHA-256"):
        streamer.load_coefficients(path)
    with pytest.raises(
        OutputExistsError, match=r"make coefficients with `streamer repair`, or pass --overwrite$"
    ):
        again()
    again(overwrite=True)
    assert again().facts == streamer.load_coefficients(path).facts
    path.write_bytes(
        sealed(path.read_bytes().replace(b"streamer.coefficients/3", b"streamer.coefficients/2"))
    )
    with pytest.raises(
        OutputExistsError,
        match=r"expected streamer\.coefficients/3, found 'streamer\.coefficients/2'; .*--overwrite$",
    ):
        again()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"keep": 0.95}, "--keep"), ({"weights": (1.0, 8.0)}, "--mu"), ({"seed": 1}, "--seed")],
)
def test_a_rerun_with_another_option_names_it(
    home: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    given = {"general": home / "general.npy", "task": home / "task.npy", "on_event": str}
    streamer.repair_adapter(home / "base", home / "adapter", tmp_path / "out", **given)
    with pytest.raises(
        OutputExistsError, match=rf"holds coefficients of other inputs or options \({words}\)"
    ):
        streamer.repair_adapter(
            home / "base", home / "adapter", tmp_path / "out", **given, **options
        )


def test_a_finished_run_needs_no_budget_of_its_own(home: Path, tmp_path: Path) -> None:
    """A budget decides no figure: neither a fit nor a map is refused or made again for another one."""
    given = {"general": home / "general.npy", "on_event": str}
    for max_memory, state in ((None, "written"), ("2G", "present")):
        record = streamer.repair_adapter(
            home / "base",
            home / "adapter",
            tmp_path / "out",
            task=home / "task.npy",
            max_memory=max_memory,
            **given,
        )
        assert record["state"] == state
        streamer.map_inputs(
            home / "base", tmp_path / "map.safetensors", max_memory=max_memory, **given
        )

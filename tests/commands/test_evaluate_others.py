"""`streamer evaluate` on further texts, of an adapter without intruders, and beside a file or a journal of an earlier version."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import Server
from learned import evaluate, make_learned
from stops import stopping_at
from test_schemas import check

import streamer
from streamer.errors import Interrupted
from streamer.storage.journal import Journal

SHRINKS = ["--method", "shrink", "--lambda", "0.75,0.5"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_learned(tmp_path_factory.mktemp("others"))
    ids = np.load(home / "all.npy")
    np.save(home / "some.npy", ids[:48])
    np.save(home / "near.npy", np.concatenate([np.load(home / "task.npy"), ids[:8]]))
    return home


def test_another_text_is_measured_as_the_general_one_would_be(server: Server, home: Path, tmp_path: Path) -> None:
    """To the bit; table, JSON and page have it, and the suggestion is what it was."""
    output, more = tmp_path / "e.json", ["--other", home / "near.npy", "--other", home / "some.npy"]
    done = evaluate(server, home, output, *SHRINKS, *more)
    assert (done.code, done.err) == (0, "")
    head = done.out.splitlines()[2].split()
    assert head[-10:-7] == ["near.npy", "near.npy", "kept"]
    tree = check(evaluate(server, home, output, *SHRINKS, *more, "--json"), "streamer.evaluation/1")
    assert tree["state"] == "present"
    near, some = tree["others"]
    assert (near["name"], near["effect"], some["name"]) == ("near.npy", "improves", "some.npy")
    assert [one["name"] for one in tree["texts"]["others"]] == ["near.npy", "some.npy"]
    other = json.loads((tmp_path / "e.json").read_text())
    assert evaluate(server, home, tmp_path / "o.json", *SHRINKS, general=home / "some.npy").code == 0
    as_general = {v["name"]: v for v in json.loads((tmp_path / "o.json").read_text())["variants"]}
    for v in other["variants"]:
        if v["name"] in as_general:
            assert v["others"][1]["sums"] == as_general[v["name"]]["general"]["sums"], v["name"]
    assert evaluate(server, home, tmp_path / "two.json", *SHRINKS).code == 0
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["suggestion"] == other["suggestion"]
    e = streamer.load_evaluation(output)
    assert list(e.others) == ["near.npy", "some.npy"]
    found = streamer.detect_intruder_dimensions(home / "base", home / "adapter", tmp_path / "f.safetensors", top_k=4)
    assert found.intruders
    page = server.run("report", tmp_path / "f.safetensors", output, "-o", tmp_path / "r.html")
    assert page.code == 0
    assert '"others":[{"name":"near.npy","effect":"improves"}' in (tmp_path / "r.html").read_text()


def test_variants_are_added_on_the_same_texts_alone(server: Server, home: Path, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    assert evaluate(server, home, output, *SHRINKS, "--other", home / "some.npy").code == 0
    before = output.read_bytes()
    for options, what in (([], "other text some.npy is not asked for"),
                          (["--other", home / "some.npy", "--other", home / "near.npy"], "other text near.npy is asked for")):  # fmt: skip
        done = evaluate(server, home, output, "--method", "shrink", "--lambda", "0.62", *options)
        assert (done.code, f"of other inputs or options ({what})" in done.err, output.read_bytes()) == (4, True, before)
    done = evaluate(server, home, output, "--method", "shrink", "--lambda", "0.62", "--other", home / "some.npy")
    assert done.code == 0
    e = streamer.load_evaluation(output)
    assert e.others["some.npy"].loss.shape == (len(e.variants), 48)
    assert e["shrink 0.62"]["others"][0]["name"] == "some.npy"


def test_names_are_those_of_files(server: Server, home: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    shutil.copy(home / "some.npy", tmp_path / "sub" / "some.npy")
    two = ["--other", home / "some.npy", "--other", tmp_path / "sub" / "some.npy"]
    done = evaluate(server, home, tmp_path / "e.json", *two)
    assert done.code == 2
    assert "--other: expected files of different names, found two named 'some.npy'; rename one" in done.err
    done = evaluate(server, home, tmp_path / "e.json", *SHRINKS, "--other", home / "task.npy")
    assert "task.npy is the same as the task text: it adds no information" in done.err


def test_a_file_of_an_earlier_version_is_not_added_to(server: Server, home: Path, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    assert evaluate(server, home, output, *SHRINKS).code == 0
    tree = json.loads(output.read_text())
    for v in tree["variants"]:
        for text in ("general", "task"):
            del v[text]["sums"]["right"]
    output.write_text(json.dumps(tree))
    done = evaluate(server, home, output, *SHRINKS)
    assert done.code == 4
    assert "(no right, as of an earlier version); choose another output, or pass --overwrite" in done.err
    assert evaluate(server, home, output, *SHRINKS, "--overwrite").code == 0
    assert streamer.load_evaluation(output)["adapter"]["task"]["top1"] is not None


def test_a_journal_with_other_sums_is_started_over(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an earlier version left it: its passes do not say what this one is to write."""
    monkeypatch.setattr("streamer.measuring.pass_memory.ROWS", 40)

    def run(output: Path, **options: Any) -> streamer.Evaluation:
        given = {"general": home / "general.npy", "task": home / "task.npy", "other": home / "some.npy"}
        chosen = {"methods": ["shrink"], "lambdas": [0.5], "max_memory": "4G", "sequences": 6}
        return streamer.evaluate_variants(home / "base", home / "adapter", output, **given, **chosen, **options)

    output, events = tmp_path / "e.json", []
    with pytest.raises(Interrupted):
        run(output, monitor=stopping_at(60, "evaluate"))
    (path,) = tmp_path.glob(".*.journal")
    journal = Journal(path)
    head, count = json.loads(journal[0]), len(journal)
    assert count > 2
    rest = [journal[i] for i in range(1, count)]
    journal.remove()
    journal = Journal(path)
    for record in [json.dumps({**head, "bits": head["bits"].removesuffix(" kl_bins")}).encode(), *rest]:
        journal.append(record)
    journal.close()
    made = run(output, on_event=events.append)
    assert not [e for e in events if e.stage == "note" and "resum" in e.name]
    assert made.to_json() == run(tmp_path / "again.json", on_event=events.append).to_json()


def test_without_intruders_nothing_that_scales_them_runs(server: Server, home: Path, tmp_path: Path) -> None:
    """Whether the findings are given or made: a line says so, the file has no such variant, and another run has nothing to do."""
    found = streamer.detect_intruder_dimensions(home / "base", home / "adapter", top_k=4, threshold_epsilon=1e-6)
    assert found.intruders == 0
    found.save(tmp_path / "none.safetensors")
    for name, options in (
        ("given", ["--findings", tmp_path / "none.safetensors"]),
        ("made", ["--top-k", 4, "--epsilon", 1e-6]),
    ):
        output = tmp_path / f"{name}.json"
        done = evaluate(server, home, output, *options, "--lambda", "0.75,0.5")
        assert (done.code, done.err) == (0, ""), name
        assert "no intruder was found (epsilon 1e-06): paper and project change nothing, and were not run" in done.out
        tree = json.loads(output.read_text())
        assert {v["method"] for v in tree["variants"]} == {None, "shrink"}
        assert (tree["intruders"], tree["detection"]["threshold_epsilon"]) == (0, 1e-6)
        again = evaluate(server, home, output, *options, "--lambda", "0.75,0.5", "--json-events")
        assert "exists already" in again.out
        assert not [e for e in map(json.loads, again.err.splitlines()) if e.get("stage") == "evaluate"]
        alone = check(
            evaluate(server, home, tmp_path / f"p{name}.json", *options, "--method", "paper", "--json"),
            "streamer.evaluation/1",
        )
        assert [v["name"] for v in alone["variants"]] == ["base", "adapter"]
    given, made = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("given", "made"))
    assert given["variants"] == made["variants"]

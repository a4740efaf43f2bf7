"""`streamer evaluate` from outside: its table, its JSON, its forecast, further texts, earlier versions, and what is wrong."""

import json
import shutil
from pathlib import Path

import fitted
import numpy as np
import pytest
from architectures import ATTENTION
from causal_models import make_adapter, make_base
from command_line import process_mib, run_cli
from forks import Server
from learned import evaluate, make_learned
from test_schemas import check

import streamer
from streamer.evaluation.evaluate import BLOCK_SEQUENCES
from streamer.linalg.torch_state import has_fast_bfloat16


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = make_learned(tmp_path_factory.mktemp("evaluate"))
    ids = np.load(home / "all.npy")
    np.save(home / "some.npy", ids[:48])
    np.save(home / "near.npy", np.concatenate([np.load(home / "task.npy"), ids[:8]]))
    streamer.detect_intruder_dimensions(
        home / "base", home / "adapter", home / "f.safetensors", top_k=4
    )
    return home


@pytest.mark.long
def test_a_process_of_its_own_says_nothing_of_libraries_that_transformers_imports(
    home: Path, tmp_path: Path
) -> None:
    """Of torchao, say, whose compiled parts do not load on a processor."""
    texts = ["--general", home / "general.npy", "--task", home / "task.npy"]
    done = run_cli(
        "evaluate",
        home / "base",
        home / "adapter",
        *texts,
        "--method",
        "shrink",
        "-o",
        tmp_path / "e.json",
        "-qq",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_lambda_joins_a_file_that_stands(server: Server, home: Path, tmp_path: Path) -> None:
    """It alone is measured (`faults`); the file may know nothing yet of the intruders that it is about."""
    output = tmp_path / "e.json"
    first = check(
        evaluate(server, home, output, "--method", "shrink", "--json"), "streamer.evaluation/1"
    )
    line = "--method", "shrink", "--lambda", "0.62", "--dry-run", "--json"
    tree = check(evaluate(server, home, output, *line), "streamer.dry-run/1")
    assert (tree["state"], tree["forecast"]["read_bytes"] > 0) == ("new", True)
    tree = check(
        evaluate(
            server, home, output, "--findings", home / "f.safetensors", "--lambda", "0.62", "--json"
        ),
        "streamer.evaluation/1",
    )
    assert {"paper 0.62", "shrink 0.62", *(v["name"] for v in first["variants"])} <= {
        v["name"] for v in tree["variants"]
    }
    assert tree["detection"]["top_k"] == 4
    stands = output.read_bytes()
    fewer, more = (
        f"{count} sequences of 8 tokens, not 24 sequences of 8 tokens" for count in (4, 32)
    )
    for options, texts, differs in (
        (["--findings", home / "f.safetensors", "--scale", "first"], {}, "--select"),
        (["--projected"], {}, "--projected"),
        (["--method", "shrink"], {"task": home / "all.npy"}, f"task text: {more}"),
        (["--sequences", "4"], {}, f"general text: {fewer}, task text: {fewer}"),
    ):
        done = evaluate(server, home, output, *options, **texts)
        assert (done.code, output.read_bytes()) == (4, stands)
        assert done.err == (
            f"streamer: {output}: holds an evaluation of other inputs or options ({differs}); choose another output, or pass --overwrite\n"
        )


def test_swapped_texts_are_asked_about(server: Server, home: Path, tmp_path: Path) -> None:
    swapped = {"general": home / "task.npy", "task": home / "general.npy"}
    done = evaluate(
        server, home, tmp_path / "e.json", "--method", "shrink", "--length", "11", **swapped
    )
    assert done.code == 0
    (line,) = done.err.splitlines()
    assert line.startswith(
        "streamer: warning: the adapter's loss on the task's text is above the base's, by "
    )
    assert line.endswith(": are the two texts swapped?")
    lines = done.out.splitlines()
    assert lines[0].endswith("are the two texts swapped?")
    words = lines[-1].removeprefix("next: streamer ").split()
    assert words[:7] == [
        "evaluate",
        f"{home / 'base'}",
        f"{home / 'adapter'}",
        "--general",
        f"{home / 'general.npy'}",
        "--task",
        f"{home / 'task.npy'}",
    ]
    assert words[7:] == ["-o", "OTHER", "--length", "11"]  # as much of the texts
    tree = json.loads((tmp_path / "e.json").read_text())
    assert (tree["suggestion"]["swapped"], tree["suggestion"]["name"]) == (True, None)


def test_the_suggested_command_makes_what_was_measured(
    server: Server, home: Path, tmp_path: Path
) -> None:
    output = tmp_path / "e.json"
    asked = ["--findings", home / "f.safetensors", "--keep", "0.7", "--method", "project,shrink"]
    done = evaluate(server, home, output, *asked, "--json")
    tree = check(done, "streamer.evaluation/1")
    assert tree["state"] == "written"
    assert {**json.loads(output.read_text()), "output": str(output), "state": "written"} == tree
    found = tree["suggestion"]
    enough = [v for v in tree["variants"] if v["name"] != "base" and v["kept"] >= 0.7]
    assert len([v for v in tree["variants"] if v["method"] == "shrink"]) == 3, "one is placed"
    assert found["name"] == min(enough, key=lambda v: v["general"]["kl"])["name"]
    text = evaluate(server, home, output, *asked).out
    (line,) = [
        line.partition(": ")[2] for line in text.splitlines() if "streamer mitigate " in line
    ]
    words = line.replace("OUTPUT", str(tmp_path / "made")).split()[1:]
    assert server.run(*words).code == 0
    record = json.loads((tmp_path / "made" / "streamer.json").read_text())
    assert (record["method"], record["lambda"]) == (found["method"], found["lambda"])


def other_coefficients(home: Path, place: Path) -> Path:
    """Coefficients of another adapter on the same base."""
    cls = make_base("llama", place / "base")
    other = make_adapter(cls, home / "base", place / "other", ATTENTION, r=3)
    return fitted.coefficients_file(place / "other.safetensors", home / "base", other)


def test_a_mitigated_adapter_is_to_be_merged(server: Server, home: Path, tmp_path: Path) -> None:
    for name, lam in (("mitigated", 0.9), ("converted", 1.0)):
        options = {"method": "shrink", "mitigation_lambda": lam}
        streamer.reduce_intruder_dimension(
            home / "base", home / "adapter", tmp_path / name, **options
        )
        line = [
            home / "base",
            tmp_path / name,
            "--general",
            home / "general.npy",
            "--task",
            home / "task.npy",
        ]
        done = server.run("evaluate", *line, "-o", tmp_path / f"{name}.json")
        command = "merge" if name == "mitigated" else "repair"
        assert done.out.splitlines()[-1].startswith(
            f"next: streamer {command} {home / 'base'} {tmp_path / name} "
        )


def test_a_dry_run_writes_nothing(server: Server, home: Path, tmp_path: Path) -> None:
    tree = check(
        evaluate(server, home, tmp_path / "e.json", "--dry-run", "--json"), "streamer.dry-run/1"
    )
    assert (tree["state"], tree["command"], tree["matrices"]) == ("new", "evaluate", 8)
    assert tree["forecast"]["peak_memory_bytes"] > 200 << 20
    assert list(tmp_path.iterdir()) == []


def test_a_line_for_each_thing_that_is_wrong(server: Server, home: Path, tmp_path: Path) -> None:
    np.save(other := tmp_path / "other.npy", np.array([[1, 2, 3], [1, 2, 99]]))
    np.save(long := tmp_path / "long.npy", np.zeros((2, 65), int))
    (text := tmp_path / "a.txt").write_text("one two")
    (lines := tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ')
    budget = f"{process_mib() + 100}M"
    cases: list[tuple[list[object], dict[str, Path], int, str]] = [
        (
            [],
            {"task": other},
            3,
            f"{other}: expected token ids from 0 to 63, found 99 in sequence 2",
        ),
        (
            [],
            {"task": long},
            2,
            f"{long}: a sequence has 65 tokens, and the model 64 positions; give --length 64",
        ),
        ([], {"task": text}, 3, f"{home}/base: has no tokenizer, which a.txt needs"),
        ([], {"general": lines}, 3, f"{home}/base: has no tokenizer, which a.jsonl needs"),
        ([], {"task": tmp_path / "absent.npy"}, 3, f"{tmp_path}/absent.npy: no such file"),
        (
            ["--coefficients", other_coefficients(home, tmp_path)],
            {},
            3,
            "of another adapter (config_sha256, weights_sha256 differ)",
        ),
        (["--keep", "90"], {}, 2, "--keep: expected a share in (0, 1], found 90.0"),
        (
            ["--max-memory", budget],
            {},
            2,
            f"--max-memory: {budget} is not enough for a sweep of 512 tokens; it needs ",
        ),
        (
            ["--method", "paper"],
            {},
            2,
            "--findings: paper 0.75 needs them, found none; run `streamer detect`, and pass its file",
        ),
    ]
    for options, texts, code, message in cases:
        done = evaluate(server, home, tmp_path / "e.json", *options, **texts)
        assert (done.code, done.out) == (code, ""), (message, done.err)
        (line,) = done.err.splitlines()
        assert message in line
    assert not (tmp_path / "e.json").exists()


def test_products_of_bfloat16_are_recorded(server: Server, home: Path, tmp_path: Path) -> None:
    output = tmp_path / "e.json"
    if has_fast_bfloat16():
        tree = check(
            evaluate(server, home, output, "--method", "shrink", "--dtype", "bf16", "--json"),
            "streamer.evaluation/1",
        )
        assert tree["dtype"] == "bf16"
        other = evaluate(server, home, output, "--method", "shrink")
        assert (other.code, output.read_text().count('"dtype": "bf16"')) == (4, 1)
    slow = "import streamer.measuring.facts as o; o.has_fast_bfloat16 = lambda: False"
    done = evaluate(server, home, output, "--dtype", "bf16", before=slow)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(
        "streamer: --dtype: bf16 needs a processor that multiplies bfloat16 matrices"
    )
    assert len(done.err.splitlines()) == 1


def test_without_transformers_a_line_says_what_to_install(
    server: Server, home: Path, tmp_path: Path
) -> None:
    done = evaluate(server, home, tmp_path / "e.json", before="sys.modules['transformers'] = None")
    assert done.code == 2
    assert done.err == (
        "streamer: evaluate and repair need transformers 5, which is not installed; pip install 'intruder-streamer[evaluate]'\n"
    )


def test_it_stops_when_the_answer_is_clear(server: Server, tmp_path: Path) -> None:
    """A variant that joins later runs on the same sequences, and what stands stays as it is."""
    home = make_learned(tmp_path, 64, 56)
    output = tmp_path / "e.json"
    given = ["--sequences", 64, "--keep", 0.6]
    first = check(
        evaluate(server, home, output, *given, "--lambda", 0.75, "--json"), "streamer.evaluation/1"
    )
    assert first["suggestion"]["name"] == "shrink 0.75"
    count = len(first["tokens"]["task"])
    assert BLOCK_SEQUENCES <= count < 64
    assert count % BLOCK_SEQUENCES == 0
    assert first["texts"]["task"]["sequences"] == 64
    both = check(
        evaluate(server, home, output, *given, "--lambda", "0.75,0.5", "--json"),
        "streamer.evaluation/1",
    )
    assert both["tokens"] == first["tokens"]
    stood = [v["name"] for v in first["variants"]]
    assert [v for v in both["variants"] if v["name"] in stood] == first["variants"]
    whole = streamer.evaluate_variants(
        home / "base",
        home / "adapter",
        general=home / "general.npy",
        task=home / "task.npy",
        sequences=64,
        lambdas=[0.75, 0.5],
        keep=0.999,
    )
    assert len(whole.task.tokens) == 64, "no answer is clear"
    own = next(v for v in both["variants"] if v["name"] == "shrink 0.5")
    assert own["task"]["sums"]["loss"] == pytest.approx(
        whole["shrink 0.5"]["task"]["sums"]["loss"][:count]
    )


SHRINKS = ["--method", "shrink", "--lambda", "0.75,0.5"]


def test_another_text_is_measured_as_the_general_one_would_be(
    server: Server, home: Path, tmp_path: Path
) -> None:
    """To the bit; table, JSON and page have it, and the suggestion is what it was."""
    output = tmp_path / "e.json"
    more = ["--other", home / "near.npy", "--other", home / "some.npy"]
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
    assert (
        evaluate(server, home, tmp_path / "o.json", *SHRINKS, general=home / "some.npy").code == 0
    )
    as_general = {v["name"]: v for v in json.loads((tmp_path / "o.json").read_text())["variants"]}
    for v in other["variants"]:
        if v["name"] in as_general:
            assert v["others"][1]["sums"] == as_general[v["name"]]["general"]["sums"], v["name"]
    assert evaluate(server, home, tmp_path / "two.json", *SHRINKS).code == 0
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["suggestion"] == other["suggestion"]
    e = streamer.load_evaluation(output)
    assert list(e.others) == ["near.npy", "some.npy"]
    page = server.run("report", output, "-o", tmp_path / "r.html")
    assert page.code == 0
    assert '"others":["near.npy","some.npy"]' in (tmp_path / "r.html").read_text()


def test_variants_are_added_on_the_same_texts_alone(
    server: Server, home: Path, tmp_path: Path
) -> None:
    output = tmp_path / "e.json"
    assert evaluate(server, home, output, *SHRINKS, "--other", home / "some.npy").code == 0
    before = output.read_bytes()
    for options, what in (
        ([], "other text some.npy is not asked for"),
        (
            ["--other", home / "some.npy", "--other", home / "near.npy"],
            "other text near.npy is asked for",
        ),
    ):
        done = evaluate(server, home, output, "--method", "shrink", "--lambda", "0.62", *options)
        assert (
            done.code,
            f"of other inputs or options ({what})" in done.err,
            output.read_bytes(),
        ) == (4, True, before)
    done = evaluate(
        server, home, output, "--method", "shrink", "--lambda", "0.62", "--other", home / "some.npy"
    )
    assert done.code == 0
    e = streamer.load_evaluation(output)
    assert e.others["some.npy"].loss.shape == (len(e.variants), 32)
    assert e["shrink 0.62"]["others"][0]["name"] == "some.npy"


def test_names_are_those_of_files(server: Server, home: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    shutil.copy(home / "some.npy", tmp_path / "sub" / "some.npy")
    two = ["--other", home / "some.npy", "--other", tmp_path / "sub" / "some.npy"]
    done = evaluate(server, home, tmp_path / "e.json", *two)
    assert done.code == 2
    assert (
        "--other: expected files of different names, found two named 'some.npy'; rename one"
        in done.err
    )
    done = evaluate(server, home, tmp_path / "e.json", *SHRINKS, "--other", home / "task.npy")
    assert "task.npy is the same as the task text: it adds no information" in done.err


def test_without_intruders_nothing_that_scales_them_runs(
    server: Server, home: Path, tmp_path: Path
) -> None:
    """A line says so, the file has no such variant, and another run has nothing to do."""
    found = streamer.detect_intruder_dimensions(
        home / "base", home / "adapter", top_k=4, threshold_epsilon=1e-6
    )
    assert found.intruders == 0
    found.save(tmp_path / "none.safetensors")
    output = tmp_path / "e.json"
    options = ["--findings", tmp_path / "none.safetensors", "--lambda", "0.75,0.5"]
    done = evaluate(server, home, output, *options)
    assert (done.code, done.err) == (0, "")
    assert (
        "no intruder was found (epsilon 1e-06): paper and project change nothing, and were not run"
        in done.out
    )
    tree = json.loads(output.read_text())
    assert {v["method"] for v in tree["variants"]} == {None, "shrink"}
    assert (tree["intruders"], tree["detection"]["threshold_epsilon"]) == (0, 1e-6)
    again = evaluate(server, home, output, *options, "--json-events")
    assert "exists already" in again.out
    assert not [e for e in map(json.loads, again.err.splitlines()) if e.get("stage") == "evaluate"]
    done = evaluate(server, home, tmp_path / "p.json", *options, "--method", "paper", "--json")
    assert [v["name"] for v in check(done, "streamer.evaluation/1")["variants"]] == [
        "base",
        "adapter",
    ]

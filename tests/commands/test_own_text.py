"""`streamer repair` and `evaluate` without text of the task: the adapter writes it, and its file is a text like any other."""

from __future__ import annotations

import json
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forks import Server
from helpers import tree_digest
from test_schemas import check

import streamer
from streamer.errors import FormatError, printable
from streamer.measuring.own_text import load_own_text
from streamer.measuring.texts import read_text

DEMO = Path(streamer.__file__).parent / "demo"
BASE = DEMO / "base"
ADAPTER = DEMO / "adapter"
SMALL = "--sequences", 8, "--length", 32


@pytest.fixture(scope="module")
def repaired(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "out"
    tree = check(
        server.run("repair", BASE, ADAPTER, "-o", out, *SMALL, "--json"), "streamer.repair/1"
    )
    assert (tree["own_text"], len(tree["samples"])) == (str(out.with_name("out.own.jsonl")), 3)
    assert all(row["kept"] == pytest.approx(row["behaviour_kept"]) for row in tree["rows"])
    return out


def test_the_text_is_saved_and_is_what_task_accepts(
    server: Server, repaired: Path, tmp_path: Path
) -> None:
    own = repaired.with_name("out.own.jsonl")
    lines = [json.loads(line) for line in own.read_text().splitlines()]
    assert [(len(line["ids"]), line["start"]) for line in lines] == [(32, 1)] * 8
    config = json.loads((BASE / "config.json").read_text())
    starts = {line["ids"][0] for line in lines}
    assert starts <= {config["bos_token_id"], config["eos_token_id"]}
    text = read_text(own, BASE, sequences=8, length=32)
    assert text.drawn
    assert [ids.tolist() for ids in text.ids] == [line["ids"] for line in lines]
    given = server.run("repair", BASE, ADAPTER, "--task", own, "-o", tmp_path / "out", *SMALL)
    assert given.code == 0
    fits = [
        path.with_name(f"{path.name}.fit.safetensors").read_bytes()
        for path in (repaired, tmp_path / "out")
    ]
    assert fits[0] == fits[1]
    assert tree_digest(repaired) == tree_digest(tmp_path / "out")


def page_data(page: Path) -> dict[str, Any]:
    """Read the object that a page holds."""
    return json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])


def samples_of(own: bytes) -> list[str]:
    """Return the beginnings of the first three texts of a file, as a page has them."""
    return [textwrap.shorten(json.loads(line)["text"], 400) for line in own.splitlines()[:3]]


def test_the_same_seed_writes_the_same_text_and_another_one_another(
    server: Server, repaired: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    other = tmp_path / "other"
    assert server.run("repair", BASE, ADAPTER, "-o", again, *SMALL).code == 0
    assert server.run("repair", BASE, ADAPTER, "-o", other, *SMALL, "--seed", 5).code == 0
    texts = [
        path.with_name(f"{path.name}.own.jsonl").read_bytes() for path in (repaired, again, other)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    shown = server.run("repair", BASE, ADAPTER, "-o", repaired, *SMALL)
    assert shown.last.startswith("streamer: repair: exists already")
    assert (
        len([line for line in shown.out.splitlines() if line.startswith("the adapter wrote: ")])
        == 3
    )
    page = tmp_path / "page.html"
    assert server.run("report", repaired, "-o", page).code == 0
    assert page_data(page)["samples"] == [*map(printable, samples_of(texts[0]))]
    refused = server.run("repair", BASE, ADAPTER, "-o", repaired, *SMALL, "--seed", 5)
    assert (
        refused.code,
        "text that an adapter wrote of other inputs or options (--seed)" in refused.err,
    ) == (4, True)


def test_a_dry_run_forecasts_the_text_and_the_fit_and_writes_nothing(
    server: Server, repaired: Path, tmp_path: Path
) -> None:
    def forecast(*options: object) -> dict[str, Any]:
        tree = check(
            server.run(
                "repair",
                BASE,
                ADAPTER,
                "-o",
                tmp_path / "out",
                *SMALL,
                "--dry-run",
                "--json",
                *options,
            ),
            "streamer.dry-run/1",
        )
        return {"files": tree["files"], **tree["forecast"]}

    whole = forecast()
    fit = forecast("--task", repaired.with_name("out.own.jsonl"))
    assert list(tmp_path.iterdir()) == []
    assert whole["files"] == fit["files"] + 1
    weights = (BASE / "model.safetensors").stat().st_size
    assert whole["read_bytes"] - fit["read_bytes"] == pytest.approx(32 * weights, rel=0.1), (
        "31 steps, and the check"
    )
    assert whole["seconds"] > fit["seconds"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "The value of\nAn expression\n"),
        ("p.jsonl", '{"prompt": "The value of"}\n{"prompt": "An expression"}\n'),
    ],
)
def test_prompts_begin_the_sequences_and_do_not_count(
    server: Server, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    done = server.run(
        "repair", BASE, ADAPTER, "--prompts", tmp_path / name, "-o", tmp_path / "out", *SMALL
    )
    assert done.code == 0
    lines = load_own_text(tmp_path / "out.own.jsonl").lines
    assert [line["text"].partition("The value of")[0] == "" for line in lines] == [True, False] * 4
    text = read_text(tmp_path / "out.own.jsonl", BASE, sequences=8, length=32)
    assert [int(counted.sum()) for counted in text.counted] == [
        32 - line["start"] for line in lines
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "p.npy",
            "",
            "expected the name of a file of prompts to end in .txt or .jsonl, found '.npy'",
        ),
        ("p.txt", "\n", "expected prompts, one a line, found none"),
        ("p.jsonl", "{}\n", "expected an object with 'prompt' or 'messages', found '{}'"),
        ("p.jsonl", "{\n", "expected a JSON object, found other bytes"),
        ("p.jsonl", '{"messages": []}\n', "the chat template refuses it"),
    ],
)
def test_bad_prompts_are_refused(
    server: Server, tmp_path: Path, name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content)
    done = server.run(
        "repair", BASE, ADAPTER, "--prompts", tmp_path / name, "-o", tmp_path / "out", *SMALL
    )
    assert (done.code in (2, 3), words in done.err) == (True, True), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"ids": [1, 2, 3], "start": 3}', "'start' to leave tokens to predict"),
        ('{"ids": "1", "start": 1}', "'ids' to be a list"),
        ('{"ids": [1, 2, -3], "start": 1}', "'ids' to be a list"),
        ('{"ids": [1, 2, 99999], "start": 1}', "expected token ids from 0"),
    ],
)
def test_lines_of_ids_that_make_no_sense_are_refused(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "t.jsonl").write_text(f'{{"ids": [1, 2, 3], "start": 1}}\n{line}\n')
    with pytest.raises(FormatError, match=words):
        read_text(tmp_path / "t.jsonl", BASE, vocabulary=1000)


def test_an_evaluation_needs_no_text(server: Server, tmp_path: Path) -> None:
    done = server.run(
        "evaluate", BASE, ADAPTER, "-o", tmp_path / "e.json", "--sequences", 8, "--length", 32
    )
    assert done.code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"e.json", "e.json.own.jsonl"}
    evaluation = streamer.load_evaluation(tmp_path / "e.json")
    own = (tmp_path / "e.json.own.jsonl").read_bytes()
    assert server.run("report", tmp_path / "e.json", "-o", tmp_path / "e.html").code == 0
    assert page_data(tmp_path / "e.html")["samples"] == [*map(printable, samples_of(own))]
    assert done.out.count("the adapter wrote: ") == 3
    assert evaluation.task.share("loss", 2).value == pytest.approx(
        evaluation.task.share("kl_from_adapter", 2).value
    )
    in_memory = streamer.evaluate_variants(BASE, ADAPTER, sequences=8, length=32)
    assert in_memory.task.loss == pytest.approx(evaluation.task.loss, rel=1e-6)


@pytest.mark.parametrize(
    "line",
    [
        {"text": "The value of an expression is", "ids": [1, 2, 3]},
        {"text": "The value of an expression is", "start": 1, "ids": [1, 2], "source": "x"},
        {"prompt": "The value of", "completion": " an expression", "ids": [7], "start": 1},
    ],
)
def test_other_lines_may_have_keys_of_these_names(tmp_path: Path, line: dict[str, object]) -> None:
    plain = {key: value for key, value in line.items() if key not in ("ids", "start")}
    texts = []
    for name, one in (("a.jsonl", line), ("b.jsonl", plain)):
        (tmp_path / name).write_text(f"{json.dumps(one)}\n" * 2)
        texts.append(read_text(tmp_path / name, BASE))
    assert not texts[0].drawn
    assert texts[0].digest() == texts[1].digest()


def test_a_file_of_its_name_that_holds_something_else_is_kept(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "out.own.jsonl").write_text('{"text": "my own text"}\n')
    done = server.run("repair", BASE, ADAPTER, "-o", tmp_path / "out", *SMALL)
    assert (done.code, done.err.count("\n")) == (4, 1)
    assert "out.own.jsonl" in done.err
    assert (tmp_path / "out.own.jsonl").read_text() == '{"text": "my own text"}\n'


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--general", "missing.txt"), 3, "missing.txt: no such file"),
        (
            ("--length", 1100),
            2,
            "--length: the model has 1024 positions, found 1100; give --length 1024",
        ),
        (("--prompts", "long.txt"), 2, "long.txt: a prompt has "),
        (
            ("--prompts", "empty.jsonl"),
            3,
            "empty.jsonl: line 2: expected a prompt, found an empty one",
        ),
    ],
)
def test_what_would_end_the_run_ends_it_before_the_adapter_writes(
    server: Server, tmp_path: Path, options: tuple[object, ...], code: int, words: str
) -> None:
    (tmp_path / "long.txt").write_text("The value of an expression is " * 20)
    (tmp_path / "empty.jsonl").write_text('{"prompt": "The value of"}\n{"prompt": ""}\n')
    given = [
        tmp_path / word if str(word).endswith((".txt", ".jsonl")) else word for word in options
    ]
    before = {*tmp_path.iterdir()}
    done = server.run("repair", BASE, ADAPTER, "-o", tmp_path / "out", "--sequences", 8, *given)
    assert (done.code, words in done.err) == (code, True), done.err
    assert {*tmp_path.iterdir()} == before


def test_a_fit_of_other_options_is_refused_before_the_adapter_writes(
    server: Server, repaired: Path, tmp_path: Path
) -> None:
    fit = repaired.with_name("out.fit.safetensors")
    (tmp_path / fit.name).write_bytes(fit.read_bytes())
    done = server.run("repair", BASE, ADAPTER, "-o", tmp_path / "out", *SMALL, "--keep", 0.8)
    assert (done.code, "of other inputs or options (--keep)" in done.err) == (4, True), done.err
    assert {path.name for path in tmp_path.iterdir()} == {fit.name}
    done = server.run("repair", BASE, ADAPTER, "-o", tmp_path / "out", *SMALL)
    assert (done.code, "out.fit.safetensors holds this very fit already" in done.err) == (
        0,
        True,
    ), "under any name"


@pytest.mark.long
def test_a_base_without_a_tokenizer_needs_none(server: Server, tmp_path: Path) -> None:
    for path in BASE.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / "base").mkdir(exist_ok=True)
            (tmp_path / "base" / path.name).symlink_to(path)
    general = BASE.with_name("general.npy")
    done = server.run(
        "repair", tmp_path / "base", ADAPTER, "--general", general, "-o", tmp_path / "out", *SMALL
    )
    assert done.code == 0
    assert "text" not in json.loads((tmp_path / "out.own.jsonl").read_text().splitlines()[0])


@pytest.mark.long
def test_text_of_another_adapter_is_a_text_like_any_other(repaired: Path, tmp_path: Path) -> None:
    """Its loss is that of its tokens, and not an expectation under an adapter that did not draw them."""
    own = repaired.with_name("out.own.jsonl")
    lines = [json.loads(line) for line in own.read_text().splitlines()]
    np.save(tmp_path / "ids.npy", np.array([line["ids"] for line in lines]))
    options = {
        "general": BASE.with_name("general.npy"),
        "sequences": 8,
        "length": 32,
        "on_event": str,
    }
    first = json.loads(own.read_text().splitlines()[0])
    first["facts"]["adapter"]["weights_sha256"] = "0" * 64
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in (first, *lines[1:]))
    )
    by_this, by_other, plain = (
        streamer.evaluate_variants(BASE, ADAPTER, task=task, **options)
        for task in (own, tmp_path / "other.jsonl", tmp_path / "ids.npy")
    )
    np.testing.assert_allclose(by_other.task.loss, plain.task.loss, rtol=1e-6)
    assert not np.allclose(by_this.task.loss, plain.task.loss, rtol=1e-3)


@pytest.mark.long
def test_an_evaluation_without_a_file_leaves_nothing(server: Server) -> None:
    before = {*Path(tempfile.gettempdir()).glob("streamer-*")}
    done = server.run("evaluate", BASE, ADAPTER, "--sequences", 8, "--length", 32)
    assert (done.code, "of its behaviour on text that it wrote" in done.out) == (0, True)
    assert {*Path(tempfile.gettempdir()).glob("streamer-*")} == before
    assert (
        server.run("evaluate", BASE, ADAPTER, "--sequences", 8, "--length", 32, "--seed", 7).code
        == 0
    )
    refused = server.run("evaluate", BASE, ADAPTER, "--dry-run")
    assert (refused.code, "-o: a forecast is for a file" in refused.err) == (2, True)
    refused = server.run(
        "evaluate", BASE, ADAPTER, "--task", BASE.with_name("task.npy"), "--seed", 7
    )
    assert (refused.code, "--seed: decides only what the adapter writes" in refused.err) == (
        2,
        True,
    )

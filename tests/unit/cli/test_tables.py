"""Tables of every kind: rows, names, columns and lines that fit; what is open and why; the help and its examples."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from seeds import vary

import streamer
from streamer.cli.tables import findings_table
from streamer.cli.terminal import screen
from streamer.detection.findings import _ranks
from streamer.plan.name_matching import natural
from streamer.tables import Column, Screen, fit, shorten, table


@pytest.mark.parametrize(
    ("solver", "precision", "certified", "decided", "reason"),
    [
        ("dense", "float32", True, "dense", False),
        ("dense", "float64", True, "dense, float64", False),
        ("dense", "float64", False, "dense, float64, open", False),
        ("dense", "float32", False, "dense, open", True),
        ("certified", "float32", False, "certified, open", True),
        ("certified", "float64", False, "certified, float64, open", True),  # no room for a full SVD
    ],
)
def test_who_decided_and_what_more_memory_may_settle(
    job: tuple[Path, Path], solver: str, precision: str, certified: bool, decided: str, reason: bool
) -> None:
    found = streamer.detect_intruder_dimensions(*job)
    # Whatever this seed's own matrices took to decide: one next to the threshold takes float64.
    first, *rest = (
        replace(
            m, detection=replace(m.detection, solver="dense", precision="float32", certified=True)
        )
        for m in found.matrices
    )
    changed = replace(
        first,
        detection=replace(first.detection, solver=solver, precision=precision, certified=certified),
    )
    text = findings_table(replace(found, matrices=(changed, *rest)))
    rows = [
        line for line in text.splitlines() if first.tensor in line and "not certified" not in line
    ]
    assert ("decided" in text) == (decided != "dense")
    assert [row.rstrip().endswith(decided) for row in rows] == [decided != "dense"]
    assert (f"not certified: {first.tensor}" in text) == (not certified)
    assert ("1 of these for lack of memory: with a larger --max-memory" in text) == reason


def test_memory_settles_no_matrix_whose_full_svds_are_not_repeated(job: tuple[Path, Path]) -> None:
    found = streamer.detect_intruder_dimensions(*job)
    first = found.matrices[0]
    large = replace(
        first,
        shape=(4096, 14336),
        detection=replace(first.detection, precision="float32", certified=False),
    )
    assert "want of memory" not in findings_table(replace(found, matrices=(large,)))


LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@pytest.mark.parametrize(
    "names",
    [
        [
            "model.embed_tokens.weight",
            *(f"model.layers.{i}.{n}.weight" for i in (0, 2, 10) for n in LAYER),
            "lm_head.weight",
        ],
        [
            f"h.{i}.{n}"
            for i in (1, 9, 11)
            for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ],
        [
            f"bert.encoder.layer.{i}.{n}.weight"
            for i in (3, 20)
            for n in (
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
                "intermediate.dense",
                "output.dense",
            )
        ],
        [
            f"model.layers.3.mlp.experts.{n}[{e}]"
            for n in ("gate_up_proj", "down_proj")
            for e in (0, 2, 12)
        ],
        [
            f"model.layers.0.block_sparse_moe.experts.{e}.{n}.weight"
            for e in (2, 10)
            for n in ("w1", "w3", "w2")
        ],
    ],
)
def test_rows_are_in_the_order_in_which_people_count(names: list[str]) -> None:
    mixed = random.Random(vary(0)).sample(names, len(names))
    assert sorted(mixed, key=natural) == names


@pytest.mark.parametrize(
    ("width", "short"),
    [
        (100, "model.layers.11.self_attn.q_proj.weight"),
        (36, "model.layers.11.self_attn.q_proj"),
        (30, "…layers.11.self_attn.q_proj"),
        (22, "…11.self_attn.q_proj"),
        (12, "…11…q_proj"),
    ],
)
def test_a_shortened_name_keeps_layer_and_projection(width: int, short: str) -> None:
    names = [f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 11) for n in "kq"]
    assert shorten(names, width)[-1] == short


def test_shortened_names_stay_different() -> None:
    names = [
        f"model.{side}.layers.{i}.{n}.weight"
        for side in ("encoder", "decoder")
        for i in (0, 10)
        for n in LAYER
    ]
    for width in range(12, 45):
        short = shorten(names, width)
        assert max(map(len, short)) <= width
        assert len(set(short)) == len(names) or width < 20, (width, short)


def test_columns_give_way_from_the_least_important() -> None:
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    columns = [
        Column("matrix", names, left=True, names=True, foot="all 3"),
        Column("aa", ["1"] * 3, "of no use", priority=1),
        Column("bb", ["22"] * 3, "of use", priority=2, foot="66"),
        Column("cc", ["3"] * 3),
    ]
    for width in (*range(20, 60), None):
        text = table(columns, Screen(width))
        assert width is None or max(map(len, text.splitlines())) <= width, (width, text)
        head = text.splitlines()[0]
        left_out = text.rpartition("hidden columns")[2] if "hidden" in text else ""
        assert (
            ("of no use" in text) == ("aa" in head) == ("aa" not in left_out.replace("matrix", ""))
        )
        assert "bb" in head or "aa" not in head
        assert "all 3" in text
    assert "model.layers.0.mlp.up_proj.weight  " in table(columns, Screen())
    assert table([Column("matrix", [], names=True)], Screen(20)) == "matrix\n------"


def test_text_is_wrapped_but_no_path_is_torn() -> None:
    path = "/data/" + "x" * 60
    lines = fit(
        f"wrote {path}: 7 files\nsome words that are more than forty columns long in all", 40
    ).split("\n")
    assert any(path in line for line in lines)
    assert all(len(line) <= 40 for line in lines if path not in line)
    assert fit("a " * 200, None) == "a " * 200


def test_the_width_is_what_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without it, in a pipe, nothing is shortened."""
    monkeypatch.setenv("COLUMNS", "57")
    assert screen() == Screen(57)
    for nonsense in ("", "0", "-3", "wide"):
        monkeypatch.setenv("COLUMNS", nonsense)
        assert screen(every=True) == Screen(None, every=True)


def test_ranks_are_counted_from_one() -> None:
    assert [_ranks(r) for r in ((), (0,), (0, 1), (0, 2), (0, 1, 2, 5))] == [
        "-",
        "1",
        "1 2",
        "1 3",
        "1-3 6",
    ]


def test_a_name_does_not_steer_the_terminal() -> None:
    text = table([Column("matrix", ["a.\x1b[31m.b\r", "é"], left=True, names=True)], Screen(40))
    assert r"a.\x1b[31m.b\r" in text
    assert "é" in text
    assert text.replace("\n", "").isprintable()


def test_the_examples_in_the_help_are_understood() -> None:
    import shlex

    from streamer.cli.parser import EXAMPLES, build_parser

    for command, text in EXAMPLES.items():
        given = [line.split("|")[0] for line in text.splitlines() if line.startswith("  streamer")]
        assert given, command
        for line in given:
            assert build_parser().parse_args(shlex.split(line)[1:]).command == command


def test_the_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from streamer.cli.parser import EXAMPLES, build_parser

    monkeypatch.setenv("COLUMNS", "80")
    parser = build_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert commands.keys() == EXAMPLES.keys()
    for one in (parser, *commands.values()):
        long = [line for line in one.format_help().splitlines() if len(line) > 80]
        assert not long, long
        assert " _" not in one.format_help()

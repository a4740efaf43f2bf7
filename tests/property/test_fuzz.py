"""A short walk of the fuzzer, and every input that it found streamer wrong on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fuzz import attempt, fault, fuzz
from fuzz_targets import NAMES, TARGETS, Target, Trouble
from mutate import dump, header_of, journal_bytes, records_of, with_header
from seeds import vary

from streamer.errors import StreamerError

# Warnings about old versions of PEFT or odd patterns are expected here.
pytestmark = pytest.mark.filterwarnings(
    "ignore::streamer.errors.StreamerWarning", "ignore::FutureWarning"
)

EXECUTIONS = 120
P = f"base_model.model.{NAMES[0]}"


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Target]:
    made: dict[str, Target] = {}

    def get(name: str) -> Target:
        if name not in made:
            made[name] = TARGETS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("name", TARGETS)
def test_what_it_begins_with_is_taken(targets: Callable[[str], Target], name: str) -> None:
    target = targets(name)
    assert [e for data in target.seeds if (e := attempt(target, data))] == []


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_a_short_walk_finds_no_crash(targets: Callable[[str], Target], name: str) -> None:
    result = fuzz(targets(name), str(vary("the suite")), 60, EXECUTIONS)
    assert [crash.what for crash in result.crashes.values()] == []
    assert result.refused > EXECUTIONS // 10


@pytest.mark.long
def test_whatever_stands_there_is_decoded_or_refused(targets: Callable[[str], Target]) -> None:
    """Each tensor of each encoding: missing, of another dtype, turned, without sizes, and one more or less in each size."""
    target = targets("quantized")
    for tree in map(json.loads, target.seeds):
        for name, what in tree["tensors"].items():
            dtype, shape, *fill = what if isinstance(what, list) else ("U8", [len(what)])
            sizes = [
                [n + by * (i == at) for i, n in enumerate(shape)]
                for at in range(len(shape))
                for by in (-1, 1)
            ]
            others = [
                (other, shape) for other in ("I8", "U8", "I32", "I64", "F32", "BF16", "F8_E4M3")
            ]
            for other in (None, *others, *((dtype, size) for size in (*sizes, shape[::-1], []))):
                stands = {} if other is None else {name: [*other, *fill]}
                rest = {key: value for key, value in tree["tensors"].items() if key != name}
                e = attempt(target, dump({**tree, "tensors": rest | stands}))
                assert e is None or fault(e) == "", (name, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_long_walk_finds_no_crash(targets: Callable[[str], Target], name: str) -> None:
    result = fuzz(targets(name), str(vary("a long one")), 120, 1 << 60)
    assert [crash.what for crash in result.crashes.values()] == []


def put(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set one value of a tree."""
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def changed(data: bytes, path: tuple[Any, ...], value: Any) -> bytes:
    """A JSON document with one other value."""
    tree = json.loads(data)
    put(tree, path, value)
    return dump(tree)


def figures(data: bytes, path: tuple[Any, ...], value: Any, key: str = "findings") -> bytes:
    """A file of findings, or of another kind by the key of its text, in which the text has one other value."""
    tree, rest = header_of(data)
    tree["__metadata__"][key] = changed(tree["__metadata__"][key].encode(), path, value).decode()
    return with_header(tree, rest)


def record(data: bytes, i: int, change: Callable[[bytes], bytes]) -> bytes:
    """A journal with one other record, its digest right."""
    records = records_of(data)
    records[i] = change(records[i])
    return journal_bytes(records)


FOUND: dict[str, tuple[str, int, Callable[[bytes], bytes]]] = {
    "a model_type that is a list": ("config", 0, lambda d: changed(d, ("model_type",), ["gpt2"])),
    "LoHa: factors that do not multiply": ("adapter", 6, lambda d: changed(d, ("tensors", f"{P}.hada_w2_b"), ["F32", [4, 16]])),
    "LoHa: a factor of three dimensions": ("adapter", 6, lambda d: changed(d, ("tensors", f"{P}.hada_w1_a"), ["F32", [16, 2, 1]])),
    "LoKr: factors that do not multiply": ("adapter", 7, lambda d: changed(d, ("tensors", f"{P}.lokr_w2_a"), ["F32", [4, 4]])),
    "LoKr: a factor of three dimensions": ("adapter", 7, lambda d: changed(d, ("tensors", f"{P}.lokr_w2_a"), ["F32", [4, 4, 1]])),
    "AdaLoRA: a rank for each direction": ("adapter", 8, lambda d: changed(d, ("tensors", f"{P}.ranknum"), ["F32", [2, 1]])),
    "AdaLoRA: alpha no number": ("adapter", 8, lambda d: changed(d, ("config", "lora_alpha"), "4x")),
    "VeRA: a projection of three dimensions": (
        "adapter", 9, lambda d: changed(d, ("tensors", "base_model.model.vera_A"), ["F32", [2, 16, 16]])),
    "OFT: eps no number": ("adapter", 10, lambda d: changed(d, ("config", "eps"), "\x1b[2J")),
    "a method with a line break": ("adapter", 0, lambda d: changed(d, ("config", "peft_type"), "LO\nRA")),
    "a method of 70,000 letters": ("adapter", 0, lambda d: changed(d, ("config", "peft_type"), "x" * 70_000)),
    "GPTQ: groups that are one number": ("quantized", 8, lambda d: changed(d, ("tensors", f"{NAMES[0]}.g_idx"), ["I32", []])),
    "a way of quantization of 70,000 letters": (
        "quantized", 0, lambda d: changed(d, ("quantization_config", "quant_method"), ["x" * 70_000])),
    "findings: no similarity": ("findings", 0, lambda d: figures(d, ("matrices", 0, "delta_norm"), None)),
    "findings: a word for a number": ("findings", 0, lambda d: figures(d, ("matrices", 0, "delta_norm"), "1.0")),
    "findings: a list for a number": ("findings", 0, lambda d: figures(d, ("matrices", 0, "intruder_energy"), [0.5])),
    "findings: certified by an object": ("findings", 0, lambda d: figures(d, ("matrices", 0, "certified"), {})),
    "findings: degenerate directions that are none": ("findings", 0, lambda d: figures(d, ("matrices", 0, "degenerate"), [99])),
    "findings: a base that is a list": ("findings", 0, lambda d: figures(d, ("base",), ["files"])),
    "findings: files that are numbers": ("findings", 0, lambda d: figures(d, ("base", "files"), 0.5)),
    "findings: a file without a name": ("findings", 0, lambda d: figures(d, ("base", "files", 0), {})),
    "an evaluation: a method that is an object": ("evaluation", 0, lambda d: changed(d, ("variants", 2, "method"), {})),
    "an evaluation: sums that overflow": ("evaluation", 0, lambda d: changed(d, ("variants", 2, "task", "sums", "loss", 0), 1e308)),
    "an evaluation: counts of tokens that overflow": ("evaluation", 0, lambda d: changed(d, ("tokens", "task", 0), 1e308)),
    "a detection's journal of another kind": (
        "detection journal", 2, lambda d: record(d, 0, lambda r: changed(r, ("stamps",), 0).replace(b"stamps", b"spams"))),
    "a detection's journal of more threads than a process may have": (
        "detection journal", 2, lambda d: record(d, 0, lambda r: changed(r, ("threads",), 1 << 24))),
    "a detection's record that is no file": ("detection journal", 2, lambda d: record(d, 1, lambda r: b"x" * 50)),
    "a detection's record of nothing": ("detection journal", 2, lambda d: record(d, 1, lambda r: (2).to_bytes(8, "little") + b"{}")),
    "a detection's record without figures": (
        "detection journal", 2, lambda d: record(d, 1, lambda r: r.replace(b'"matrix"', b'"matrux"'))),
    "a detection's record without a decision's certificate": (
        "detection journal", 2, lambda d: record(d, 1, lambda r: r.replace(b"certified", b"certifled"))),
    "an output's record of a file that is a list": ("record", 0, lambda d: changed(d, ("files", 0, "file"), [1])),
    "findings: a digest that is a number": (
        "findings", 0, lambda d: with_header({**header_of(d)[0], "__metadata__": {"sha256": 1}}, header_of(d)[1])),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_inputs_that_once_crashed_are_decoded_or_refused(
    targets: Callable[[str], Target], case: str
) -> None:
    name, seed, change = FOUND[case]
    target = targets(name)
    data = change(target.seeds[seed])
    assert data != target.seeds[seed]
    e = attempt(target, data)
    assert e is None or fault(e) == ""
    # A journal of no run of ours is begun anew, a model_type that is none is no model's; all else is refused.
    assert isinstance(e, StreamerError) or "journal" in name or name == "config"


def test_the_fuzzer_can_fail() -> None:
    """A target that breaks on some input is found out, by an exception, a wrong answer or a long message."""

    def run(data: bytes) -> None:
        match data[0] % 4 if data else 0:
            case 1:
                raise KeyError("x")
            case 2:
                raise Trouble("wrong")
            case 3:
                raise StreamerError("please report this")

    result = fuzz(
        Target([b"\0\0\0"], lambda rng, data, others: rng.randbytes(3), run), "x", 60, 100
    )
    assert sorted(c.what.split(":")[0].split(" (")[0] for c in result.crashes.values()) == [
        "KeyError",
        "Trouble",
        "an error of our own",
    ]

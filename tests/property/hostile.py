"""Broken and hostile adapters and bases: what each is, how it comes about, and how it must end.

A case is made from a sound base and adapter by one change. It ends well if each command says one line, exits with the documented code,
and leaves every file as it was.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import three_shards, tree_digest
from safetensors.torch import load_file, save_file

COMMANDS = ("inspect", "detect", "mitigate", "merge")
PREFIX = "base_model.model.model.layers.1.self_attn.q_proj"
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Case:
    """One change of a sound input.

    Attributes
    ----------
    change
        Takes the base's and the adapter's directory.
    code
        The exit code of every command; 7 where only reading the values can tell, so that `inspect` is content.
    words
        What the line must say.
    """

    name: str
    change: Callable[[Path, Path], object]
    code: int
    words: str


def config(**changes: Any) -> Callable[[Path, Path], object]:
    """The adapter's config with other values."""

    def change(base: Path, adapter: Path) -> None:
        path = adapter / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def text(file: str, content: str | bytes, of: str = "adapter") -> Callable[[Path, Path], object]:
    """A file with this content."""

    def change(base: Path, adapter: Path) -> None:
        path = (adapter if of == "adapter" else base) / file
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def tensors(
    edit: Callable[[dict[str, torch.Tensor]], object], of: str = "adapter"
) -> Callable[[Path, Path], object]:
    """A weights file with other tensors."""

    def change(base: Path, adapter: Path) -> None:
        path = adapter / WEIGHTS if of == "adapter" else base / SHARD
        held = load_file(path)
        edit(held)
        save_file(held, path, metadata={"format": "pt"})

    return change


def header(
    edit: Callable[[dict[str, Any]], object], of: str = "adapter"
) -> Callable[[Path, Path], object]:
    """A weights file with another header over the same bytes."""

    def change(base: Path, adapter: Path) -> None:
        path = adapter / WEIGHTS if of == "adapter" else base / SHARD
        data = path.read_bytes()
        (n,) = struct.unpack("<Q", data[:8])
        tree = json.loads(data[8 : 8 + n])
        edit(tree)
        body = json.dumps(tree).encode()
        path.write_bytes(struct.pack("<Q", len(body)) + body + data[8 + n :])

    return change


def index(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], object]:
    """A base's index with other entries."""

    def change(base: Path, adapter: Path) -> None:
        tree = json.loads((base / INDEX).read_text())
        edit(tree)
        (base / INDEX).write_text(json.dumps(tree))

    return change


def entry(tree: dict[str, Any], which: int = 0) -> dict[str, Any]:
    """The n-th tensor of a header, by name."""
    return tree[sorted(k for k in tree if k != "__metadata__")[which]]


def cut(file: str, keep: int, of: str = "adapter") -> Callable[[Path, Path], object]:
    """A file's first bytes."""
    return lambda base, adapter: os.truncate((adapter if of == "adapter" else base) / file, keep)


def longer(base: Path, adapter: Path) -> None:
    with (adapter / WEIGHTS).open("ab") as f:
        f.write(b"\0" * 7)


def twice(base: Path, adapter: Path) -> None:
    path = adapter / WEIGHTS
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    body = data[8 : 8 + n].decode().rstrip()
    tree = json.loads(body)
    name = sorted(k for k in tree if k != "__metadata__")[0]
    again = (body[:-1] + f", {json.dumps(name)}: {json.dumps(tree[name])}" + "}").encode()
    path.write_bytes(struct.pack("<Q", len(again)) + again + data[8 + n :])


def replaced(
    file: str, make: Callable[[Path], object], of: str = "adapter"
) -> Callable[[Path, Path], object]:
    """Something that is no file where a file should be."""

    def change(base: Path, adapter: Path) -> None:
        path = (adapter if of == "adapter" else base) / file
        path.unlink()
        make(path)

    return change


def moved(tree: dict[str, Any]) -> None:
    tree["weight_map"]["model.layers.1.self_attn.q_proj.weight"] = (
        "model-00001-of-00003.safetensors"
    )


def renamed(to: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def edit(held: dict[str, torch.Tensor]) -> None:
        for factor in "AB":
            held[f"{to}.lora_{factor}.weight"] = held.pop(f"{PREFIX}.lora_{factor}.weight")

    return edit


A = f"{PREFIX}.lora_A.weight"
B = f"{PREFIX}.lora_B.weight"
Q = "model.layers.1.self_attn.q_proj.weight"

CASES: tuple[Case, ...] = (
    # The adapter's config.
    Case("config: empty", text(CONFIG, ""), 3, "bad JSON"),
    Case("config: cut off", text(CONFIG, '{"peft_type": "LORA", "r": '), 3, "bad JSON"),
    Case("config: a list", text(CONFIG, "[]"), 3, "expected a JSON object, found list"),
    Case("config: a key twice", text(CONFIG, '{"r": 4, "r": 4}'), 3, CONFIG),
    Case("config: a byte-order mark", text(CONFIG, "\ufeff{}"), 3, CONFIG),
    Case("config: no UTF-8", text(CONFIG, b'{"r": "\xff\xfe"}'), 3, CONFIG),
    Case("config: nested 100,000 deep", text(CONFIG, '{"r": ' + "[" * 100_000), 3, "bad JSON"),
    Case("config: a FIFO", replaced(CONFIG, os.mkfifo), 3, CONFIG),
    Case("config: without end", replaced(CONFIG, lambda p: p.symlink_to("/dev/zero")), 3, CONFIG),
    Case("config: a directory", replaced(CONFIG, Path.mkdir), 3, CONFIG),
    Case("config: a link to itself", replaced(CONFIG, lambda p: p.symlink_to(p)), 3, CONFIG),
    Case("config: rank of another adapter", config(r=8), 3, "expected rank 8"),
    Case("config: rank a word", config(r="many"), 3, "expected a number"),
    Case("config: alpha missing", config(lora_alpha=None), 3, "expected a number"),
    Case("config: alpha 0", config(lora_alpha=0), 3, "alpha"),
    Case("config: alpha Infinity", config(lora_alpha=float("inf")), 3, "Infinity"),
    Case("config: alpha of 400 digits", text(CONFIG, '{"r": 4, "lora_alpha": 1' + "0" * 400 + "}"), 3, CONFIG),
    Case("config: a pattern that is no pattern", config(rank_pattern={"(": 4}), 3, "not a regular expression"),
    Case("config: a pattern that takes for ever", config(rank_pattern={r"(([a-z._0-9])+)+#": 4}), 3, "pattern"),
    Case("config: patterns in a list", config(alpha_pattern=["q_proj"]), 3, "expected an object"),
    Case("config: an unknown variant", config(use_quantum=True), 3, "unknown key 'use_quantum'"),
    Case("config: an unknown method", config(peft_type="TELEPATHY"), 3, "TELEPATHY"),
    # The adapter's weights.
    Case("weights: a pickle", lambda base, adapter: (adapter / WEIGHTS).rename(adapter / "adapter_model.bin"), 3, "a pickle"),
    Case("weights: empty", cut(WEIGHTS, 0), 3, WEIGHTS),
    Case("weights: seven bytes", cut(WEIGHTS, 7), 3, WEIGHTS),
    Case("weights: the header cut", cut(WEIGHTS, 40), 3, "truncated"),
    Case("weights: the data cut", cut(WEIGHTS, 3000), 3, "truncated"),
    Case("weights: bytes left over", longer, 3, WEIGHTS),
    Case("weights: a header of 2^63 bytes", text(WEIGHTS, struct.pack("<Q", 1 << 63) + b"{}"), 3, WEIGHTS),
    Case("weights: a header of 99 MB that is not there", text(WEIGHTS, struct.pack("<Q", 99_000_000)), 3, WEIGHTS),
    Case("weights: a page of HTML", text(WEIGHTS, "<!DOCTYPE html><html>404</html>"), 3, WEIGHTS),
    Case("weights: a pointer of Git LFS", text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid"), 3, WEIGHTS),
    Case("weights: one name twice", twice, 3, "appears twice"),
    Case("weights: tensors overlap", header(lambda t: entry(t, 1).update(entry(t, 0))), 3, "begin"),
    Case("weights: negative offset", header(lambda t: entry(t).update(data_offsets=[-8, 8])), 3, "offset"),
    Case("weights: offsets beyond the file", header(lambda t: entry(t).update(data_offsets=[0, 1 << 60])), 3, WEIGHTS),
    Case("weights: a shape of 2^64", header(lambda t: entry(t).update(shape=[1 << 33, 1 << 33])), 3, "shape"),
    Case("weights: a negative size", header(lambda t: entry(t).update(shape=[-4, -48])), 3, "found ['F32', [-4, -48]"),
    Case("weights: an unknown dtype", header(lambda t: entry(t).update(dtype="F12")), 3, "F12"),
    Case("weights: metadata with numbers", header(lambda t: t.update(__metadata__={"a": 1})), 3, "__metadata__"),
    Case("weights: lora_A alone", tensors(lambda t: t.pop(B)), 3, "no factor B"),
    Case("weights: factors that do not multiply", tensors(lambda t: t.update({B: torch.ones(48, 3)})), 3, "multiply"),
    Case("weights: rank 0", tensors(lambda t: t.update({A: torch.ones(0, 48), B: torch.ones(48, 0)})), 3, "multiply"),
    Case("weights: integers", tensors(lambda t: t.update({A: torch.ones(4, 48, dtype=torch.int8)})), 3, "I8"),
    Case("weights: no tensors", tensors(dict.clear), 3, "expected lora_A and lora_B"),
    Case("weights: another kind's tensor", tensors(lambda t: t.update({f"{PREFIX}.mystery": torch.ones(2)})), 3, "mystery"),
    Case("weights: a module that the base lacks", tensors(renamed(PREFIX.replace("1", "77"))), 3, "layers.77"),
    Case("weights: a name with a line break", tensors(renamed("base_model.model.a\n\x1b[2Jb")), 3, "refused"),
    Case("weights: the same factor twice",
         tensors(lambda t: t.update({A.replace("lora_A", "lora_A.default"): t[A].clone()})), 3, "same factor"),
    Case("weights: a FIFO", replaced(WEIGHTS, os.mkfifo), 3, WEIGHTS),
    Case("weights: NaN", tensors(lambda t: t[A].fill_(float("nan"))), 7, "NaN or Inf"),
    Case("weights: overflow", tensors(lambda t: (t[A].fill_(1e38), t[B].fill_(1e38))), 7, "overflows"),
    # The base.
    Case("base: a shard is missing", lambda base, adapter: (base / SHARD).unlink(), 3, SHARD),
    Case("base: a shard is cut", cut(SHARD, 5000, "base"), 3, "truncated"),
    Case("base: a shard is a FIFO", replaced(SHARD, os.mkfifo, "base"), 3, SHARD),
    Case("base: a shard is a directory", replaced(SHARD, Path.mkdir, "base"), 3, SHARD),
    Case("base: the index is no JSON", text(INDEX, "{", "base"), 3, "bad JSON"),
    Case("base: the index has no map", text(INDEX, "{}", "base"), 3, "weight_map"),
    Case("base: the index maps to a number", index(lambda t: t["weight_map"].update({Q: 7})), 3, INDEX),
    Case("base: the index leads outside", index(lambda t: t["weight_map"].update({Q: "../../x.safetensors"})), 3, INDEX),
    Case("base: the index names a pickle", index(lambda t: t["weight_map"].update({Q: "model.bin"})), 3, INDEX),
    Case("base: the index names another shard", index(moved), 3, Q),
    Case("base: the index leaves a tensor out", index(lambda t: t["weight_map"].pop(Q)), 3, Q),
    Case("base: the config is no JSON", text("config.json", "{", "base"), 3, "config.json"),
    Case("base: a tensor of another shape", tensors(lambda t: t.update({Q: torch.ones(7, 9)}), "base"), 3, "expected shape"),
    Case("base: packed integers", tensors(lambda t: t.update({Q: torch.ones(48, 48, dtype=torch.uint8)}), "base"), 3, "U8"),
    Case("base: tensors overlap", header(lambda t: entry(t, 1).update(entry(t, 0)), "base"), 3, "begin"),
    Case("base: NaN", tensors(lambda t: t[Q].fill_(float("nan")), "base"), 7, "NaN or Inf"),
    Case("base: Inf", tensors(lambda t: t[Q][0].fill_(float("inf")), "base"), 7, "NaN or Inf"),
)  # fmt: skip


def run_case(case: Case, home: Path, run: Callable[..., tuple[int, str, str]]) -> list[str]:
    """What went wrong, a line each; `run` runs the command line and returns exit code, stdout and stderr."""
    base, adapter = three_shards(home)
    case.change(base, adapter)
    before = contents(home)
    wrong = []
    for command in COMMANDS:
        out = home / f"out-{command}.safetensors"
        code, said, error = run(
            command, base, adapter, *([] if command == "inspect" else ["-o", out])
        )
        expected = 0 if command == "inspect" and case.code == 7 else case.code
        if code != expected:
            wrong.append(f"{command}: exit code {code}, expected {expected}: {error}")
        elif code and (
            said
            or error.count("\n") != 1
            or not error.startswith("streamer: ")
            or case.words not in error
        ):
            wrong.append(
                f"{command}: said {said!r} and {error!r}, expected one line with {case.words!r}"
            )
        elif code and len(error.replace(str(home), "")) > 320:
            wrong.append(f"{command}: {len(error)} characters in {error!r}")
        elif code and "\x1b" in error:
            wrong.append(f"{command}: control characters in {error!r}")
        if case.code == 7:
            # What stands there is for the same command to go on with, and nothing has its final name.
            final = (
                [p for p in out.rglob("*") if not p.name.startswith(".")] if out.is_dir() else []
            )
            wrong += [
                f"{command}: left {p.name}" for p in final if p.name in (WEIGHTS, CONFIG, INDEX)
            ]
        elif contents(home) != before:
            wrong.append(f"{command}: something was written")
    return wrong


def contents(home: Path) -> dict[str, str]:
    """Digests of the files, and the names of what is none."""
    endless = any(p.is_symlink() for p in home.rglob("*"))
    return ({} if endless else tree_digest(home)) | {
        str(p): "" for p in home.rglob("*") if not p.is_file()
    }

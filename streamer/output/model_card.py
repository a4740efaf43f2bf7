"""Write the ``README.md`` of an output: facts about how it was made, followed by the card of its input.

The hub reads the YAML at the card's head. It is edited as text, key by key; a head of unexpected form stays unchanged.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamer.adapters.adapter_config import stated_options
from streamer.errors import printable
from streamer.methods import METHODS
from streamer.output.records import MitigatedMatrix, Record, Totals
from streamer.plan.sources import NameSource
from streamer.units import counted

CARD_NAME = "README.md"

MOST_BYTES = 4 << 20
"""Largest card that is edited, in bytes; a longer one stays unchanged."""

TAG = "intruder-dimensions"

KEPT = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")
"""Keys of a base's head that also hold for a model merged from it. Results, data sets and widgets belong to the base."""

WARNING_BYTES = 250
"""Space for the warning about loss in projection, without a tensor's name."""

_HEAD = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_KEY = re.compile(r"([A-Za-z_][\w-]*)[ \t]*:(?=\s)")
_ALIAS = re.compile(r"(?:^|[\s\[,])[&*]\w")
_PATH = re.compile(r"^base_model[ \t]*:\s+[\"']?(?:[/.~]|[A-Za-z]:)")
_PLAIN = re.compile(r"[A-Za-z][\w./-]*")


@dataclass(frozen=True)
class Card:
    """The facts of a card that are known before the record.

    Attributes
    ----------
    original
        The input's card as bytes; empty if there is none.
    base, adapter
        The inputs.
    command
        ``merge`` or ``mitigate``.
    pipeline
        The hub's name of the merged model's task, if it differs from the base's.
    longest
        The longest possible record, except for the warning about loss in projection.
    tuned
        Whether a fine-tuned model is used as the adapter; `original` is then that model's card.
    diffusers
        Whether the base is a diffusers pipeline.
    """

    original: bytes
    base: NameSource
    adapter: NameSource
    command: str
    pipeline: str
    longest: Record
    tuned: bool = False
    diffusers: bool = False

    @property
    def most_bytes(self) -> int:
        """Return the largest possible size of the card in bytes."""
        tensor = self.longest["matrices"][0]["tensor"]
        lost = WARNING_BYTES + len(repr(tensor).encode()) if self.command == "mitigate" else 0
        return len(self.text(self.longest)) + lost

    def text(self, record: Record) -> bytes:
        """Write the card of an output with this record."""
        original = self.original.decode("utf-8", "surrogateescape")
        match = _HEAD.match(original)
        head, body = (match[1].replace("\r\n", "\n"), original[match.end() :]) if match else (None, original)
        blocks = None if head is None else _blocks(head)
        merged = self.command == "merge"
        if head is not None and blocks is None:
            front = head
        else:
            front = _merged_head(self, blocks or {}) if merged else _adapter_head(self, blocks or {})
        facts = _facts(record)
        if merged and body.strip():
            what, source = ("fine-tuned", self.adapter) if self.tuned else ("base", self.base)
            body = (
                f"# Card of the {what} model\n\nThe rest is the unchanged card of {_name(source)}.\n\n{body.lstrip()}"
            )
        parts = [f"---\n{front}---", f"# {_title(self)}", facts, body.lstrip("\r\n")]
        text = "\n\n".join(part.rstrip("\n") for part in parts if part.strip()) + "\n"
        return text.encode("utf-8", "surrogateescape")


def take_original(copies: list[tuple[str, Path]]) -> tuple[bytes | None, list[tuple[str, Path]]]:
    """Take an input's card out of the files to copy; a very long one stays among them, and the result is None."""
    original = next((path for name, path in copies if name == CARD_NAME), None)
    if original is None:
        return b"", copies
    if original.stat().st_size > MOST_BYTES:
        return None, copies
    return original.read_bytes(), [c for c in copies if c[0] != CARD_NAME]


def _blocks(head: str) -> dict[str, str] | None:
    """Split a head into its keys, each with its lines; comments belong to the key above. Return None if it is not a plain mapping."""
    blocks: dict[str, str] = {}
    key = ""
    for line in head.splitlines():
        if match := _KEY.match(line + "\n"):
            key = match[1]
            if key in blocks:
                return None
            blocks[key] = ""
        elif line.strip() and not line.startswith("#") and not (key and (line.startswith((" ", "- ")) or line == "-")):
            return None
        blocks[key] = blocks.get(key, "") + line + "\n"
    # An alias refers to another key, which may not be kept.
    return None if any(_ALIAS.search(blocks.get(key, "")) for key in (*KEPT, "tags", "base_model")) else blocks


def _merged_head(card: Card, blocks: dict[str, str]) -> str:
    """Make the head of a merged model's card: our entries, and those of the base's that hold for it."""
    ids = [s["model_id"] for s in (card.base, card.adapter) if "model_id" in s]
    kept = {key: blocks[key] for key in KEPT if key in blocks}
    # If its class differs from the base's, the model does not belong to the base's library (such as sentence-transformers).
    if card.pipeline or "library_name" not in kept:
        kept["library_name"] = f"library_name: {'diffusers' if card.diffusers else 'transformers'}\n"
    if card.pipeline:
        kept["pipeline_tag"] = f"pipeline_tag: {card.pipeline}\n"
    own = ""
    if "model_id" in card.base:
        # In the hub's terms, a model from several is a merge, and a model trained from a base is a finetune.
        own = _list("base_model", ids) + f"base_model_relation: {'merge' if len(ids) > 1 else 'finetune'}\n"
    of_adapter = () if card.tuned else ("lora",) if card.diffusers else ("peft", "lora")
    return own + _list("tags", [TAG, "merged", *of_adapter]) + "".join(kept.values())


def _adapter_head(card: Card, blocks: dict[str, str]) -> str:
    """Make the head of an adapter's card: its own head, with its base and our tag."""
    base = card.base.get("model_id")
    # PEFT writes the path of a local base here, which the hub refuses.
    blocks = {key: text for key, text in blocks.items() if key != "base_model" or not _PATH.search(text)}
    if "base_model" not in blocks and base is not None:
        blocks["base_model"] = f"base_model: {_scalar(base)}\n"
    if "tags" in blocks:
        blocks["tags"] = re.sub(r"(?m)^ *- base_model:adapter:[/.~].*\n", "", blocks["tags"])
    if "library_name" not in blocks:
        blocks["library_name"] = f"library_name: {'diffusers' if card.diffusers else 'peft'}\n"
    blocks["tags"] = _with_tag(blocks["tags"]) if "tags" in blocks else _list("tags", [TAG, "lora"])
    return "".join(blocks.values())


def _with_tag(block: str) -> str:
    """Add our tag to a block of tags; a block of unknown form stays unchanged."""
    if re.search(rf"(?m)[\s\[,\"']{TAG}[\"']?\s*(?:$|[,\]])", block):
        return block
    if re.fullmatch(r"tags[ ]*:[ ]*(?:\[[ ]*\])?[ ]*\n\s*", block):
        return _list("tags", [TAG])
    if match := re.fullmatch(r"(tags[ ]*:[ ]*\[[^\[\]#]*?),?([ ]*\][ ]*\n\s*)", block):
        return f"{match[1]}, {TAG}{match[2]}"
    if match := re.fullmatch(r"(tags[ ]*:[ ]*\n(?:([ ]*)- [^\n]*\n)(?:\2- [^\n]*\n)*)(.*)", block, re.DOTALL):
        return f"{match[1]}{match[2]}- {TAG}\n{match[3]}"
    return block


def _list(key: str, values: Sequence[str]) -> str:
    return f"{key}:\n" + "".join(f"- {_scalar(value)}\n" for value in values)


def _scalar(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _title(card: Card) -> str:
    base, adapter = (_safe(s["name"]) for s in (card.base, card.adapter))
    return f"{base} with {adapter} merged in" if card.command == "merge" else f"{adapter}, mitigated"


def _safe(text: str) -> str:
    """Escape a name for use in a line of Markdown."""
    return re.sub(r"[^\w .+@/-]", "_", text)


def _name(source: NameSource) -> str:
    """Return the name of a source for a card."""
    if "model_id" in source:
        return f"[{source['model_id']}](https://huggingface.co/{source['model_id']})"
    return _safe(source["name"])


def _facts(record: Record) -> str:
    """Describe how an output was made, as a table, a command, and advice."""
    base, adapter, totals = record["base"], record["adapter"], record["totals"]
    detection, named = record["detection"], adapter.get("base_model_name_or_path")
    rows = [
        (what, f"{_name(source)}, digest `{source['digest']}`")
        for what, source in (("base", base), ("adapter", adapter))
    ]
    if named not in (None, base["name"], base.get("model_id")):
        rows.append(("trained on", f"the adapter's config names `{named}` as its base"))
    rows.append(("method", _method(record)))
    if detection is not None:
        n = detection["matrices"]
        rows += [
            ("judged", f"{_top(detection['top_k'])} of each matrix; an intruder has a similarity below "
                       f"ε = {_number(detection['threshold_epsilon'])}"),
            ("intruders", f"{totals['intruders']} scaled in {sum(bool(m['intruders']) for m in record['matrices'])} of {n} matrices; "
                          f"{totals['changed']} mitigated"),
            ("certified", f"the decisions on {detection['certified']} of {n} matrices, solver {detection['solver']}"),
        ]  # fmt: skip
    else:
        rows.append(("matrices", f"{totals['changed']} of {totals['matrices']} mitigated; no detection was needed"))
    rows.append(("norm of the change", f"{totals['delta_norm']:.4g} before, {totals['delta_norm_after']:.4g} after"))
    if totals["equal_norm_shrink"] <= 1:  # a shrink cannot make a delta larger
        rows.append(("baseline", f"scaling the whole adapter by {totals['equal_norm_shrink']:.4g} gives the same norm"))
    if record["command"] == "mitigate":
        rows.append(("lost in projection", f"at most {100 * totals['dropped_max']:.2f} % of a matrix's change"))
    rows.append(("made with", f"intruder-streamer {record['version']}"))
    table = "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows)
    check = verify_line(base["name"], adapter["name"], record)
    command = f"```sh\n{printable(command_line(record))}\n{printable(check)}\n```\n"
    says = [*record["warnings"], *record["advice"]]
    advice = "Warnings and advice:\n\n" + "".join(f"- {printable(line)}\n" for line in says) if says else ""
    lines = "".join(f"- {printable(line)}\n" for line in record.get("measured", ()))
    measured = (
        f"Measured on held-out sequences, on which the weight between the texts was chosen:\n\n{lines}" if lines else ""
    )
    intro = METHODS[record["method"]].card
    return "\n".join(part for part in (intro, table, measured, command, advice) if part)


def _method(record: Record) -> str:
    if (fitted := record["coefficients"]) is not None:
        return f"{record['method']}, to keep {100 * fitted['keep']:g} % of the learning, coefficients `{fitted['sha256'][:16]}`"
    assert record["lambda"] is not None
    if "map" in record:
        return f"{record['method']}, λ = {_number(record['lambda'])}, map `{record['map']['sha256'][:16]}`"
    return f"{record['method']}, λ = {_number(record['lambda'])}, select {record['scale']}"


def _number(x: float) -> str:
    return repr(float(x)).removesuffix(".0")


def _top(k: int | float) -> str:
    if isinstance(k, int):
        return "the " + counted(k, "leading direction").removeprefix("1 ")
    return f"the leading {100 * k:g} % of the directions"


def verify_line(base: str, adapter: str, record: Mapping[str, Any]) -> str:
    """Write the command that recomputes an output."""
    return shlex.join(["streamer", "verify", "OUTPUT", base, adapter, "--sample", "all", *_file_option(record)])


def _file_option(record: Mapping[str, Any]) -> list[str]:
    return ["--map" if "map" in record else "--coefficients", record["file"]] if "file" in record else []


def command_line(record: Record) -> str:
    """Write the command that makes an output, with the names of its inputs instead of paths."""
    words = ["streamer", record["command"], record["base"]["name"], record["adapter"]["name"], "-o", "OUTPUT"]
    lam, fitted = record["lambda"], record["coefficients"]
    if fitted is not None:
        words += ["--method", record["method"], *_file_option(record), "--keep", _number(fitted["keep"])]
    else:
        assert lam is not None
        words += ["--lambda", _number(lam), "--method", record["method"]]
        words += _file_option(record) or ["--select", record["scale"]]
    if (detection := record["detection"]) is not None:
        words += ["--top-k", str(detection["top_k"]), "--epsilon", _number(detection["threshold_epsilon"])]
        words += ["--solver", detection["solver"]]
    if record["to_lora"] is not None:
        words += ["--to-lora", str(record["to_lora"])]
    if lam is not None and not 0 <= lam <= 1:
        words.append("--amplify")
    if record["dequantize"]:
        words.append("--dequantize")
    return shlex.join(words + stated_options(record["adapter"]))


def longest_matrices(tensors: Sequence[str]) -> list[MitigatedMatrix]:
    """Make metrics of matrices that all have intruders and the longest name."""
    longest = max(tensors, key=lambda name: len(repr(name).encode()))  # as warnings quote it
    return [{"tensor": longest, "module": "", "transposed": False, "intruders": [0], "certified": True, "delta_norm": 1.0,
             "delta_norm_after": 1.0, "dropped": 1.0}] * len(tensors)  # fmt: skip


def longest_totals(matrices: int, directions: int) -> Totals:
    """Make totals whose numbers are as long as possible."""
    long = -1.2345678e-100
    return {"matrices": matrices, "intruders": directions, "changed": matrices, "delta_norm": long, "delta_norm_after": long,
            "equal_norm_shrink": long, "dropped_max": 1.0, "values": 0, "rounded_away": 0, "bytes": 0}  # fmt: skip

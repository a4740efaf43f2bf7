"""Write the ``README.md`` of an output: facts about how it was made, followed by the card of its input.

The hub reads the YAML at the card's head. It is edited as text, key by key; a head of unexpected form stays unchanged.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamer.adapters.adapter_config import stated_options
from streamer.errors import printable
from streamer.methods import METHODS
from streamer.output.record_view import mitigation_lines
from streamer.output.records import Record
from streamer.plan.sources import NameSource

CARD_NAME = "README.md"

MOST_FACTS = 32 << 10
"""Bytes allowed for what a card adds to its input's: a few kilobytes, and a line for each warning."""

TAG = "intruder-dimensions"

KEPT = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")
"""Keys of a base's head that also hold for a model merged from it. Results, data sets and widgets belong to the base."""

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
    tuned
        Whether a fine-tuned model is used as the adapter; `original` is then that model's card.
    diffusers
        Whether the base is a diffusers pipeline.
    """

    original: bytes
    base: NameSource
    adapter: NameSource
    command: str
    pipeline: str = ""
    tuned: bool = False
    diffusers: bool = False

    def text(self, record: Record) -> bytes:
        """Write the card of an output with this record."""
        original = self.original.decode("utf-8", "surrogateescape")
        match = _HEAD.match(original)
        head, body = (match[1].replace("\r\n", "\n"), original[match.end() :]) if match else (None, original)
        blocks = {} if head is None else _blocks(head)
        merged = self.command == "merge"
        own = _merged_head if merged else _adapter_head
        front = head if blocks is None else own(self, blocks)
        facts = _facts(record)
        if merged and body.strip():
            what, source = ("fine-tuned", self.adapter) if self.tuned else ("base", self.base)
            body = (
                f"# Card of the {what} model\n\nThe rest is the unchanged card of {_name(source)}.\n\n{body.lstrip()}"
            )
        base, adapter = _safe(self.base["name"]), _safe(self.adapter["name"])
        title = f"{base} with {adapter} merged in" if merged else f"{adapter}, mitigated"
        parts = [f"---\n{front}---", f"# {title}", facts, body.lstrip("\r\n")]
        text = "\n\n".join(part.rstrip("\n") for part in parts if part.strip()) + "\n"
        return text.encode("utf-8", "surrogateescape")


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
    items = re.fullmatch(r"tags *: *(?:\[([^\[\]#\"']*)\] *)?\n((?: *- .*\n)*)\s*", block)
    if items is None:
        return block
    tags = [*(items[1] or "").split(","), *(line.strip()[2:] for line in items[2].splitlines()), TAG]
    return "tags:\n" + "".join(f"- {tag}\n" for tag in dict.fromkeys(tag.strip() for tag in tags) if tag)


def _list(key: str, values: Sequence[str]) -> str:
    return f"{key}:\n" + "".join(f"- {_scalar(value)}\n" for value in values)


def _scalar(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _safe(text: str) -> str:
    """Escape a name for use in a line of Markdown."""
    return re.sub(r"[^\w .+@/-]", "_", text)


def _name(source: NameSource) -> str:
    """Return the name of a source for a card."""
    if "model_id" in source:
        return f"[{source['model_id']}](https://huggingface.co/{source['model_id']})"
    return _safe(source["name"])


def _facts(record: Record) -> str:
    """Describe how an output was made, as a table, lists, and commands."""
    base, adapter, detection, fitted = record["base"], record["adapter"], record["detection"], record["coefficients"]
    rows = [(what, f"{_name(s)}, digest `{s['digest']}`") for what, s in (("base", base), ("adapter", adapter))]
    if (named := adapter.get("base_model_name_or_path")) not in (None, base["name"], base.get("model_id")):
        rows.append(("trained on", f"the adapter's config names `{named}` as its base"))
    if used := fitted or record.get("map"):
        rows.append(("coefficients" if fitted else "map", f"digest `{used['sha256'][:16]}`"))
    if detection is not None:
        scaled = sum(bool(m["intruders"]) for m in record["matrices"])
        rows.append(("intruders", f"scaled in {scaled} of {detection['matrices']} matrices"))
        rows.append(("certified", f"the decisions on {detection['certified']} of {detection['matrices']} matrices"))
    rows.append(("made with", f"intruder-streamer {record['version']}"))
    table = "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows)
    lists = {
        "Result": mitigation_lines(record),
        "Measured on held-out sequences, on which the weight between the texts was chosen": record.get("measured", ()),
        "Warnings and advice": [*record["warnings"], *record["advice"]],
    }
    listed = (
        f"{what}:\n\n" + "".join(f"- {printable(line)}\n" for line in lists[what]) for what in lists if lists[what]
    )
    check = verify_line(base["name"], adapter["name"], record)
    command = f"```sh\n{printable(command_line(record))}\n{printable(check)}\n```\n"
    return "\n".join((METHODS[record["method"]].card, table, *listed, command))


def _number(x: float) -> str:
    return repr(float(x)).removesuffix(".0")


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

"""Describe an output: its record ``streamer.json``, the summary of it, and its model card.

The card, ``README.md``, states how the output was made, followed by the card of its input. The hub reads the YAML at the card's head. It is
edited as text, key by key; a head of unexpected form stays unchanged.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict

from streamer.adapters.adapter_config import stated_options
from streamer.detection.options import RANKS, DetectionRecord
from streamer.errors import printable
from streamer.json_types import (
    Amount,
    Count,
    Keywords,
    ModuleName,
    OutputPath,
    Selection,
    Sha256,
    State,
    TensorName,
)
from streamer.methods import METHODS, MethodName, Shrink, takes_findings
from streamer.methods.files import CoefficientsRecord, MapRecord
from streamer.plan.carried_tensors import CarriedRecord
from streamer.plan.side_files import AdapterSource, BaseSource, NameSource
from streamer.units import counted, format_size

OUTPUT_SCHEMA: Final = "streamer.output/2"

MergedDtype = Literal["bf16", "fp16", "fp32"]


# fmt: off
class MitigatedMatrix(TypedDict):
    """The mitigation of one matrix."""
    tensor: TensorName
    module: ModuleName
    transposed: Annotated[bool, "Whether the base stores it as (inputs, outputs); decisions still use the output side."]
    intruders: Annotated[list[Count], RANKS, "the intruders that were scaled."]
    certified: Annotated[bool | None, "Whether its decisions are certified; null if none were needed."]
    delta_norm: Annotated[Amount, "Frobenius norm of the matrix's delta."]
    delta_norm_after: Annotated[Amount, "The same for what was written."]
    dropped: Annotated[Amount, "Share of the mitigated delta's Frobenius norm lost in projection onto the written rank; 0 for a merge."]
    values: NotRequired[Annotated[Count, "For a merge: values of the matrix, if one tensor of the base's dtype holds it, not a copy."]]
    rounded_away: NotRequired[Annotated[Count, "How many of them rounding to the dtype left as in the base although the delta is not 0."]]
    survives: NotRequired[Annotated[float, "With --requantize: share of the update's response to the map's inputs that the codes hold."]]
    rounding_error: NotRequired[Annotated[Amount, "Size of the error of that response, relative to the update's."]]

class Totals(TypedDict):
    """Totals over all matrices."""
    matrices: Annotated[Count, "Matrices that the adapter changes."]
    intruders: Annotated[Count, "Intruders that were scaled."]
    changed: Annotated[Count, "Matrices whose delta differs from the adapter's."]
    delta_norm: Annotated[Amount, "Frobenius norm of the adapter's delta over all matrices."]
    delta_norm_after: Annotated[Amount, "The same for what was written."]
    equal_norm_shrink: Annotated[Amount, "Lambda of the shrink of the whole adapter with the same norm: the baseline."]
    dropped_max: Annotated[Amount, "The largest `dropped` of a matrix."]
    values: NotRequired[Annotated[Count, "Sum of the `values` of all matrices; absent in earlier versions."]]
    rounded_away: NotRequired[Annotated[Count, "Sum of the `rounded_away` of all matrices; absent in earlier versions."]]
    bytes: Annotated[Count, "Bytes of all files except the record."]

class FileRecord(TypedDict):
    """A file of the output."""
    file: Annotated[str, "Name, relative to the output."]
    bytes: Annotated[Count, "Its size in bytes."]
    sha256: Annotated[Sha256, "Its digest (SHA-256, hexadecimal)."]

# `lambda` is a keyword of the language, so this cannot be a class.
Record = TypedDict("Record", {
    "schema": Literal["streamer.output/2"],
    "command": Annotated[str, Keywords(enum=["mitigate", "merge"]), "The command that made it."],
    "version": Annotated[str, "Version of streamer that made it."],
    "base": Annotated[BaseSource, "The base model: its name, and what identifies it, wherever it is stored."],
    "adapter": Annotated[AdapterSource, "The adapter, or the fine-tuned model used as one, described in the same way."],
    "detection": Annotated[DetectionRecord | None, "How the intruders were found; null if none were needed (method shrink, or lambda 1)."],
    "method": Annotated[MethodName, "What is scaled: paper: the whole intruder; project: only the adapter's part of it; shrink: the whole "
        "adapter, without detection. regmean replaces the right factors; nullspace reduces the response to general inputs."],
    "scale": Annotated[Selection, "Which intruders are scaled: all, or the highest-ranked one of each matrix."],
    "lambda": Annotated[float | None, "Share of an intruder to keep: 1 changes nothing, 0 removes it (project keeps the base's part); with "
        "method nullspace, share of the delta's energy on general inputs. Null with method regmean."],
    "coefficients": NotRequired[Annotated[CoefficientsRecord | None, "The fit's factors; null except with method regmean."]],
    "map": NotRequired[Annotated[MapRecord, "The map of the base's inputs; only with method nullspace."]],
    "file": NotRequired[Annotated[str, "Name of the file of coefficients or map, if there is one; else `coefficients` or `map`."]],
    "to_lora": Annotated[float | None, Keywords(exclusiveMinimum=0), "Rank or share of the energy given with --to-lora, or null."],
    "dequantize": Annotated[bool, "Whether a quantized base is written as a plain one."],
    "requantize": NotRequired[Annotated[MapRecord, "The map given with --requantize, if any: 4-bit weights were written as codes again."]],
    "dtype": NotRequired[Annotated[MergedDtype | None, "Dtype given with --dtype, if any."]],
    "for_server": NotRequired[Annotated[bool, "Whether an adapter has one rank and scale 1; absent if not."]],
    "shard_bytes": NotRequired[Annotated[Count | None, "Bytes given with --max-shard-size, if any."]],
    "totals": Annotated[Totals, "Totals over all matrices."],
    "warnings": Annotated[list[str], "What may make the result differ from what was trained or requested, one line each."],
    "notes": Annotated[list[str], "What else happened, one line each."],
    "advice": Annotated[list[str], "What would be better, one line each."],
    "measured": NotRequired[Annotated[list[str], "What `streamer repair` measured, one line each."]],
    "repair": NotRequired[Annotated[dict[str, Any], "The same as figures: `rows` and `reliable` as `streamer repair --json` prints "
        "them, the share to `keep`, and `samples` of a text that the adapter wrote."]],
    "left_out": Annotated[list[str], "Files beside the input that were not copied: weights in other formats, training state."],
    "carried": Annotated[list[CarriedRecord], "Tensors of the adapter other than factors; of a fine-tuned model, those that differ."],
    "tokenizer": NotRequired[Annotated[Literal["adapter", "base"] | None, "Whose tokenizer a merged directory has; null if none."]],
    "matrices": Annotated[list[MitigatedMatrix], "One entry per matrix, in the order of writing."],
})
Record.__doc__ = "The record of an output, without its files."

class Written(Record):
    """The record of an output, a mitigated adapter or a merged model: its `streamer.json`; `--json` prints it with `output` and `state`."""
    plan: Annotated[Sha256, "Digest of what decides the output's bytes, except last bits of given findings (SHA-256, hexadecimal)."]
    files: Annotated[list[FileRecord], "The output's files without the record, in the order of writing; the last one makes it loadable."]
    sha256: NotRequired[Annotated[Sha256, "Digest of `streamer.json` with 64 zeros in its place (SHA-256, hexadecimal); since 0.2."]]
    output: NotRequired[Annotated[OutputPath, "Printed only."]]
    state: NotRequired[Annotated[State, "Printed only."]]
# fmt: on


def totals(matrices: list[MitigatedMatrix], nbytes: int) -> Totals:
    """Sum the metrics of all matrices of an output of `nbytes` bytes."""
    before = math.sqrt(sum(m["delta_norm"] ** 2 for m in matrices))
    after = math.sqrt(sum(m["delta_norm_after"] ** 2 for m in matrices))
    return {
        "matrices": len(matrices),
        "intruders": sum(len(m["intruders"]) for m in matrices),
        "changed": sum(m["delta_norm_after"] != m["delta_norm"] for m in matrices),
        "delta_norm": before,
        "delta_norm_after": after,
        "equal_norm_shrink": after / before if before > 0 else 1.0,
        "dropped_max": max((m["dropped"] for m in matrices), default=0.0),
        "values": sum(m.get("values", 0) for m in matrices),
        "rounded_away": sum(m.get("rounded_away", 0) for m in matrices),
        "bytes": nbytes,
    }


class WrittenView(dict[str, Any]):
    """A `Written` for Python's shells: the record itself, shown as `record_lines`."""

    def __repr__(self) -> str:
        title = f"{self['output']} ({self['command']}, {self['state']})"
        return "<Written: " + "\n ".join(record_lines(self, title)) + ">"


def record_lines(record: Mapping[str, Any], title: str | None = None) -> list[str]:
    """Summarise what was written and how, what became of the delta's norm, and what was lost or left out, one line each.

    Parameters
    ----------
    title
        Start of a first line about the files: the output's location.
    """
    t = record["totals"]
    lam = record["lambda"]
    norms = f"|delta| {t['delta_norm']:.4g}"
    if lam != 1:
        norms += f" -> {t['delta_norm_after']:.4g}"
    # A shrink cannot make a delta larger.
    if lam != 1 and record["method"] != Shrink.name and t["equal_norm_shrink"] <= 1:
        norms += f"; baseline of equal norm: --method shrink --lambda {t['equal_norm_shrink']:.4f}"
    lines = [_how(record) + _rank(record), norms]
    if title is not None:
        files = counted(len(record["files"]), "file")
        lines = [f"{title}: {files}, {format_size(t['bytes'])}", *lines]
    if record["left_out"]:
        names = ", ".join(record["left_out"][:4]) + (", …" if len(record["left_out"]) > 4 else "")
        lines.append(f"not copied: {names} (weights or training state that would be stale)")
    if carried := record["carried"]:
        count = counted(len(carried), "tensor")
        lines.append(f"carried along: {count} beside the factors, {carried[0]['tensor']} first")
    if record["command"] == "merge" and record["tokenizer"] == "adapter":
        lines.append("the tokenizer and its chat template are the adapter's own")
    if lam != 1 and takes_findings(record["method"]) and not t["changed"]:
        lines.append(
            "nothing was changed, since there is no intruder; to forget less, use `streamer repair`, or --method shrink"
        )
    return [printable(line) for line in (*lines, *_losses(record))]


def _how(record: Mapping[str, Any]) -> str:
    """Say how the matrices were mitigated."""
    t = record["totals"]
    method = record["method"]
    lam = record["lambda"]
    fitted = record.get("coefficients")
    mitigated = f"{t['changed']} of {t['matrices']} matrices mitigated"
    changes = METHODS[method].changes if method in METHODS else None
    if fitted is not None:
        kept = f"to keep {100 * fitted['keep']:g}% of the learning"
        return f"method {method}, {kept}: {mitigated}, {changes or 'as it was fitted'}"
    if lam == 1:
        return "lambda 1: the unchanged adapter, nothing mitigated"
    if not takes_findings(method):
        return f"method {method}, lambda {lam:g}: {mitigated}, each {changes or 'as a whole'}"
    scaled = f"{counted(t['intruders'], 'intruder')} scaled"
    return f"method {method}, select {record['scale']}, lambda {lam:g}: {mitigated}, {scaled}"


def _rank(record: Mapping[str, Any]) -> str:
    """Say at which rank a LoRA adapter was written; nothing for another output."""
    to_lora = record["to_lora"]
    if isinstance(to_lora, float):
        return f"; written at the smallest ranks that keep {100 * to_lora:g} % of the energy"
    return f"; written at rank {to_lora}" if to_lora else ""


def _losses(record: Mapping[str, Any]) -> Iterator[str]:
    """Say what rounding, codes and projection lost."""
    t = record["totals"]
    matrices = record["matrices"]
    # Earlier versions did not count them.
    share = 100 * t.get("rounded_away", 0) / (t.get("values") or 1)
    if share >= 0.05:  # not 0.0%
        unchanged = f"rounding left {share:.1f}% of the values in these matrices unchanged"
        yield f"{unchanged}: the result is not exactly base + delta"
    if coded := [m for m in matrices if "survives" in m]:
        kept = 100 * sum(m["survives"] for m in coded) / len(coded)
        error = 100 * sum(m["rounding_error"] for m in coded) / len(coded)
        response = f"of the update's response to the map's inputs, {kept:.0f}% survives, with an error of {error:.0f}%"
        yield f"written in the base's codes: {response} (means of {counted(len(coded), 'matrix')})"
    if record["command"] == "mitigate":
        most = f"lost in projection: at most {100 * t['dropped_max']:.2f}% of a matrix's mitigated delta"
        worst = max(matrices, key=lambda m: m["dropped"], default={"dropped": 0.0})
        # Not 0.00%.
        yield f"{most}, in {worst['tensor']}" if worst["dropped"] >= 5e-5 else most


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
_PLAIN_SCALAR = re.compile(r"[A-Za-z][\w./-]*")


@dataclass(frozen=True)
class Card:
    """The facts of a card that are known before the record.

    Attributes
    ----------
    original
        The input's card as bytes; empty if there is none.
    pipeline
        The hub's name of the merged model's task, if it differs from the base's.
    tuned
        Whether a fine-tuned model is used as the adapter; `original` is then that model's card.
    diffusers
        Whether the base is a diffusers pipeline.
    """

    original: bytes
    pipeline: str = ""
    tuned: bool = False
    diffusers: bool = False

    def text(self, record: Record) -> bytes:
        """Write the card of an output with this record."""
        original = self.original.decode("utf-8", "surrogateescape")
        match = _HEAD.match(original)
        if match:
            head = match[1].replace("\r\n", "\n")
            body = original[match.end() :]
        else:
            head = None
            body = original
        blocks = {} if head is None else _blocks(head)
        merged = record["command"] == "merge"
        sources = (record["base"], record["adapter"])
        make_head = _merged_head if merged else _adapter_head
        front = head if blocks is None else make_head(self, sources, blocks)
        if merged and body.strip():
            what = "fine-tuned" if self.tuned else "base"
            source = record["adapter" if self.tuned else "base"]
            title = (
                f"# Card of the {what} model\n\nThe rest is the unchanged card of {_name(source)}."
            )
            body = f"{title}\n\n{body.lstrip()}"
        base, adapter = (_safe(source["name"]) for source in sources)
        title = f"{base} with {adapter} merged in" if merged else f"{adapter}, mitigated"
        parts = [f"---\n{front}---", f"# {title}", _facts(record), body.lstrip("\r\n")]
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
        elif (
            line.strip()
            and not line.startswith("#")
            and not (key and (line.startswith((" ", "- ")) or line == "-"))
        ):
            return None
        blocks[key] = blocks.get(key, "") + line + "\n"
    # An alias refers to another key, which may not be kept.
    if any(_ALIAS.search(blocks.get(key, "")) for key in (*KEPT, "tags", "base_model")):
        return None
    return blocks


def _merged_head(card: Card, sources: tuple[NameSource, NameSource], blocks: dict[str, str]) -> str:
    """Make the head of a merged model's card: our entries, and those of the base's that hold for it."""
    ids = [source["model_id"] for source in sources if "model_id" in source]
    base_entries = {key: blocks[key] for key in KEPT if key in blocks}
    # If its class differs from the base's, the model does not belong to the base's library (such as sentence-transformers).
    if card.pipeline or "library_name" not in base_entries:
        base_entries["library_name"] = (
            f"library_name: {'diffusers' if card.diffusers else 'transformers'}\n"
        )
    if card.pipeline:
        base_entries["pipeline_tag"] = f"pipeline_tag: {card.pipeline}\n"
    sources_head = ""
    if "model_id" in sources[0]:
        # In the hub's terms, a model from several is a merge, and a model trained from a base is a finetune.
        sources_head = (
            _list("base_model", ids)
            + f"base_model_relation: {'merge' if len(ids) > 1 else 'finetune'}\n"
        )
    of_adapter = [] if card.tuned else ["lora"]
    if of_adapter and not card.diffusers:
        of_adapter = ["peft", "lora"]
    return (
        sources_head + _list("tags", [TAG, "merged", *of_adapter]) + "".join(base_entries.values())
    )


def _adapter_head(
    card: Card, sources: tuple[NameSource, NameSource], blocks: dict[str, str]
) -> str:
    """Make the head of an adapter's card: its own head, with its base and our tag."""
    base = sources[0].get("model_id")
    # PEFT writes the path of a local base here, which the hub refuses.
    blocks = {
        key: text for key, text in blocks.items() if key != "base_model" or not _PATH.search(text)
    }
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
    tags = [
        *(items[1] or "").split(","),
        *(line.strip()[2:] for line in items[2].splitlines()),
        TAG,
    ]
    return "tags:\n" + "".join(
        f"- {tag}\n" for tag in dict.fromkeys(tag.strip() for tag in tags) if tag
    )


def _list(key: str, values: Sequence[str]) -> str:
    return f"{key}:\n" + "".join(f"- {_scalar(value)}\n" for value in values)


def _scalar(text: str) -> str:
    return text if _PLAIN_SCALAR.fullmatch(text) else json.dumps(text, ensure_ascii=False)


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
    base = record["base"]
    adapter = record["adapter"]
    detection = record["detection"]
    fitted = record["coefficients"]
    rows = [
        (what, f"{_name(s)}, digest `{s['digest']}`")
        for what, s in (("base", base), ("adapter", adapter))
    ]
    if (named := adapter.get("base_model_name_or_path")) not in (
        None,
        base["name"],
        base.get("model_id"),
    ):
        rows.append(("trained on", f"the adapter's config names `{named}` as its base"))
    if used := fitted or record.get("map"):
        rows.append(("coefficients" if fitted else "map", f"digest `{used['sha256'][:16]}`"))
    if detection is not None:
        scaled = sum(bool(m["intruders"]) for m in record["matrices"])
        rows.append(("intruders", f"scaled in {scaled} of {detection['matrices']} matrices"))
        rows.append(
            (
                "certified",
                f"the decisions on {detection['certified']} of {detection['matrices']} matrices",
            )
        )
    rows.append(("made with", f"intruder-streamer {record['version']}"))
    table = "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows)
    lists = {
        "Result": record_lines(record),
        "Measured on held-out sequences, on which the weight between the texts was chosen": record.get(
            "measured", ()
        ),
        "Warnings and advice": [*record["warnings"], *record["advice"]],
    }
    points = {
        what: "".join(f"- {printable(line)}\n" for line in lines) for what, lines in lists.items()
    }
    listed = (f"{what}:\n\n{lines}" for what, lines in points.items() if lines)
    check = verify_line(base["name"], adapter["name"], record)
    command = f"```sh\n{printable(command_line(record))}\n{printable(check)}\n```\n"
    return "\n".join((METHODS[record["method"]].card, table, *listed, command))


def _number(x: float) -> str:
    return repr(float(x)).removesuffix(".0")


def verify_line(base: str, adapter: str, record: Mapping[str, Any]) -> str:
    """Write the command that recomputes an output, or checks its digests if it holds codes."""
    if record.get("requantize"):
        return "streamer verify OUTPUT"
    return shlex.join(
        ["streamer", "verify", "OUTPUT", base, adapter, "--sample", "all", *_file_option(record)]
    )


def _file_option(record: Mapping[str, Any]) -> list[str]:
    if "file" in record:
        return ["--map" if "map" in record else "--coefficients", record["file"]]
    return []


def command_line(record: Record) -> str:
    """Write the command that makes an output, with the names of its inputs instead of paths."""
    words = [
        "streamer",
        record["command"],
        record["base"]["name"],
        record["adapter"]["name"],
        "-o",
        "OUTPUT",
    ]
    lam = record["lambda"]
    fitted = record["coefficients"]
    if fitted is not None:
        words += ["--method", record["method"], *_file_option(record)]
    else:
        assert lam is not None
        words += ["--lambda", _number(lam), "--method", record["method"]]
        words += _file_option(record) or ["--select", record["scale"]]
    if (detection := record["detection"]) is not None:
        words += [
            "--top-k",
            str(detection["top_k"]),
            "--epsilon",
            _number(detection["threshold_epsilon"]),
        ]
        words += ["--solver", detection["solver"]]
    if record["to_lora"] is not None:
        words += ["--to-lora", str(record["to_lora"])]
    if lam is not None and not 0 <= lam <= 1:
        words.append("--amplify")
    if record["dequantize"]:
        words.append("--dequantize")
    if record.get("requantize"):
        words += ["--requantize", "MAP"]
    if record.get("for_server"):
        words.append("--for-server")
    if dtype := record.get("dtype"):
        words += ["--dtype", dtype]
    if shard_bytes := record.get("shard_bytes"):
        words += ["--max-shard-size", str(shard_bytes)]
    return shlex.join(words + stated_options(record["adapter"]))

"""Write the JSON Schemas in ``streamer/schemas`` from the types of the records.

``--check`` compares them with what is there instead. `streamer.json_types` says what the types' annotations mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import is_dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from streamer.api.records import DryRun, ErrorsRecord, EventRecord, PlanRecord, SeveralRecord
from streamer.api.texts import RepairRecord
from streamer.cli.demo import DemoRecord
from streamer.detection.findings import FindingsRecord
from streamer.evaluation.evaluation import EvaluationRecord
from streamer.fitting.mapping import MapFacts
from streamer.forecast import Forecast
from streamer.json_types import Amount, Estimated, Keywords
from streamer.output.record import Written
from streamer.plan.side_files import AdapterSource, BaseSource
from streamer.verification.verify import Verification

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = ROOT / "streamer" / "schemas"

Schema = dict[str, Any]

PRINTED = {"dependentRequired": {"output": ["state"], "state": ["output"]}}


def when(events: Schema, *keys: str) -> Schema:
    """Require keys of a line with one of the events."""
    return {"if": {"properties": {"event": events}}, "then": {"required": list(keys)}}


RECORDS: dict[type, tuple[str, Schema]] = {
    DemoRecord: ("Demo", {}),
    DryRun: ("Dry run", {}),
    ErrorsRecord: ("Errors", {}),
    EvaluationRecord: ("Evaluation", PRINTED),
    EventRecord: ("Event", {"allOf": [
        when({"const": "progress"}, "stage", "name", "done", "total", "items", "of", "adapter"),
        when({"const": "error"}, "kind", "exit_code", "message", "path"),
        when({"enum": ["warning", "note", "done"]}, "message"),
    ]}),
    FindingsRecord: ("Findings", PRINTED),
    MapFacts: ("Map", {}),
    RepairRecord: ("Repair", {}),
    PlanRecord: ("Plan", {}),
    SeveralRecord: ("Several adapters", {}),
    Verification: ("Verification", {}),
    Written: ("Output", PRINTED),
}  # fmt: skip
"""What is printed or written: its title, and what no type says, which is that some keys need others."""

APART = {BaseSource, AdapterSource, Forecast}
"""Objects that have a definition of their own even if they occur once."""

PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}

NAMED = "The name of this schema; names of keys are added under it, never changed."


def schema_name(record: type) -> str:
    """Return the value of a record's key `schema`, as ``streamer.plan/1``."""
    (name,) = get_args(get_type_hints(record)["schema"])
    return str(name)


def urn(record: type) -> str:
    return "urn:intruder-streamer:" + schema_name(record).removeprefix("streamer.").replace(
        "/", ":"
    )


def keys_of(record: type) -> dict[str, Any]:
    """Return the types of a record's keys; a dataclass may hold another, whose keys are its own, and tensors, which are no keys."""
    hints = get_type_hints(record, include_extras=True)
    if not is_dataclass(record):
        return hints
    keys = (
        (keys_of(hint) if is_dataclass(hint) else {key: hint})
        for key, hint in hints.items()
        if hint is not Tensor
    )
    return dict(chain.from_iterable(own.items() for own in keys))


def with_errors(hints: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys and types, each `Mean` or `Difference` followed by its standard error."""
    for key, hint in hints.items():
        yield key, hint
        inner, optional = (
            (get_args(hint)[0], True) if get_origin(hint) is NotRequired else (hint, False)
        )
        one, *metadata = get_args(inner) if get_origin(inner) is Annotated else (inner,)
        null = type(None) in get_args(one)
        metadata += (
            [more for part in get_args(one) for more in getattr(part, "__metadata__", ())]
            if null
            else []
        )
        for error in (more.error for more in metadata if isinstance(more, Estimated)):
            described = Annotated[Amount, error] | None if null else Annotated[Amount, error]
            yield f"{key}_se", NotRequired[described] if optional else described


class Maker:
    """Make the schema of a record: objects that occur more than once are under ``$defs``."""

    def __init__(self, root: type) -> None:
        self.root = root
        self.uses = Counter[type]()
        self.defs = {}
        self.shared = set[type]()
        self.fields(root)  # to count
        self.shared = {one for one, count in self.uses.items() if count > 1 or one in APART}
        self.uses.clear()

    def schema(self) -> Schema:
        """Make the whole schema."""
        title, more = RECORDS[self.root]
        head = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "$id": urn(self.root),
            "title": title,
        }
        tree = self.fields(self.root)
        tree["properties"]["schema"]["description"] = NAMED
        return head | tree | more | ({"$defs": self.defs} if self.defs else {})

    def fields(self, record: type) -> Schema:
        """Describe an object by its keys."""
        hints = keys_of(record)
        always = getattr(record, "__required_keys__", hints)
        hints = dict(with_errors(hints))
        always = {*always, *(key for key in hints if key.removesuffix("_se") in always)}
        required = [
            key
            for key, hint in hints.items()
            if key in always and get_origin(hint) is not NotRequired
        ]
        keys = sorted(
            hints, key=lambda key: key != "schema"
        )  # which is the first, whatever a record inherits
        text = " ".join((record.__doc__ or "").split("\n\n")[0].split())
        return {
            "type": "object",
            **({"description": text} if text else {}),
            "properties": {key: self.value(hints[key]) for key in keys},
            "required": sorted(required, key=keys.index),
        }

    def value(self, hint: Any, made_from: type | None = None) -> Schema:
        """Describe the values of a type."""
        if get_origin(hint) is NotRequired:
            (hint,) = get_args(hint)
        text = ""
        more = {}
        if get_origin(hint) is Annotated:
            hint, *metadata = get_args(hint)
            text = " ".join(one for one in metadata if isinstance(one, str))
            more = {
                key: value
                for one in metadata
                if isinstance(one, Keywords)
                for key, value in one.keywords.items()
            }
            made_from = next((one for one in metadata if isinstance(one, type)), made_from)
        tree = self.plain(hint, made_from)
        if "enum" in more:
            kinds = tree.pop("type")
            more["enum"] = [*more["enum"], *([None] if "null" in kinds else [])]
        told = {"type": tree.pop("type")} if "type" in tree else {}
        return (
            told | tree | more
            if not text
            else told | {"description": text} | (tree | more | {"description": text})
        )

    def plain(self, hint: Any, made_from: type | None) -> Schema:
        """Describe the values of a type without annotations."""
        origin = get_origin(hint)
        args = get_args(hint)
        if origin in (types.UnionType, Union):
            return self.union([self.value(one, made_from) for one in args])
        if origin is Literal:
            return {"const": args[0]} if len(args) == 1 else {"enum": list(args)}
        if origin in (list, tuple):
            return {"type": "array", "items": self.value(args[0], made_from)}
        if origin is dict and made_from is None:
            return {"type": "object", "additionalProperties": self.value(args[1])}
        if hint is Any:
            return {}
        return {"type": PLAIN[hint]} if hint in PLAIN else self.object(made_from or hint)

    def union(self, parts: list[Schema]) -> Schema:
        """Describe one of several; a type that may be null has a list of types, an enumeration null among its values."""
        *some, last = parts
        if last != {"type": "null"} or len(some) > 1 or "$ref" in some[0]:
            return {"anyOf": parts}
        (one,) = some
        return one | (
            {"enum": [*one["enum"], None]} if "enum" in one else {"type": [one["type"], "null"]}
        )

    def object(self, record: type) -> Schema:
        """Describe an object, or name the schema that does."""
        if record in RECORDS and record is not self.root:
            return {"$ref": urn(record)}
        self.uses[record] += 1
        if record not in self.shared:
            return self.fields(record) if self.uses[record] == 1 else {"type": "object"}
        name = record.__name__.lstrip("_")
        if name not in self.defs:
            self.defs[name] = {}  # its place, before those of the objects in it
            self.defs[name] = self.fields(record)
        return {"$ref": f"#/$defs/{name}"}


def printed(tree: Any, indent: int = 0, broken: bool = False) -> str:
    """Print a schema: a key on one line, but for objects with keys of their own."""
    if not (isinstance(tree, dict) and (broken or has_keys(tree))):
        return json.dumps(tree, ensure_ascii=False)
    lines: list[str] = []
    for key, value in tree.items():
        item = f"{json.dumps(key)}: {printed(value, indent + 1, key in ('properties', '$defs'))}"
        if lines and not broken and "\n" not in item and "\n" not in lines[-1]:
            lines[-1] += f", {item}"
        else:
            lines.append(item)
    return (
        "{\n" + ",\n".join(" " * (indent + 1) + line for line in lines) + "\n" + " " * indent + "}"
    )


def has_keys(tree: Schema) -> bool:
    """Test whether an object's keys are described in a schema, however deep."""
    return "properties" in tree or any(
        isinstance(one, dict) and has_keys(one) for one in tree.values()
    )


def made() -> dict[Path, str]:
    """Make all schemas."""
    names = {
        record: schema_name(record).removeprefix("streamer.").replace("/", "-")
        for record in RECORDS
    }
    return {
        SCHEMAS / f"{name}.json": printed(Maker(record).schema()) + "\n"
        for record, name in names.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, and name the files that differ"
    )
    check = parser.parse_args(argv).check
    differ = 0
    for path, text in made().items():
        if not path.exists() or path.read_text() != text:
            print(f"{path.relative_to(ROOT)}: {'differs' if check else 'written'}")
            differ = 1
            if not check:
                path.write_text(text)
    return differ if check else 0


if __name__ == "__main__":
    sys.exit(main())

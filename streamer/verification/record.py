"""Read an output's record, ``streamer.json``, and compare it with itself and with the metadata of its safetensors files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamer.errors import FormatError, MissingInputError
from streamer.verification.mitigation import WITNESSED
from streamer.verification.result import RECORD_NAME, Outcome
from streamer.verification.tensors import TensorFiles

SCHEMA = "streamer.output/2"
JOURNAL_NAME = ".streamer.journal"

_TYPES: dict[str, type | tuple[type, ...]] = {
    "command": str, "version": str, "base": dict, "adapter": dict, "detection": (dict, type(None)), "method": str, "scale": str,
    "lambda": (int, float, type(None)), "to_lora": (int, float, type(None)), "dequantize": bool, "totals": dict, "warnings": list,
    "notes": list, "advice": list, "left_out": list, "carried": list, "matrices": list, "plan": str, "files": list,
    "tokenizer": (str, type(None)),
}  # fmt: skip
_OPTIONAL: dict[str, type | tuple[type, ...]] = {"coefficients": (dict, type(None)), "measured": list, "map": dict}
"""Keys that records of earlier versions lack."""

_NESTED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "files": {"file": str, "bytes": int, "sha256": str},
    "matrices": {
        "tensor": str, "module": str, "intruders": list, "certified": (bool, type(None)), "delta_norm": (int, float),
        "delta_norm_after": (int, float), "dropped": (int, float),
    },
    "carried": {"tensor": str, "change": str, "by": str},
}  # fmt: skip

DIGEST = "sha256"
"""Key of the digest that a file holds of itself: over all its bytes, with zeros in place of the digest."""

IN_SHORT = ("name", "model_id", "revision", "digest")
"""Keys of an input that a file's metadata repeats."""


def read_record(output: Path) -> dict[str, Any] | str:
    """Read an output's record, or return what is wrong with it. Keys that a later version added are ignored.

    Raises
    ------
    MissingInputError
        If there is no record, so no finished output.
    FormatError
        If it has another version's schema.
    """
    path = output / RECORD_NAME
    if not path.is_file():
        found = _found(output)
        raise MissingInputError(
            f"{output}: expected {RECORD_NAME}, the record of a finished output, found {found}", path
        )
    try:
        record = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as e:
        return f"invalid JSON ({e})"
    if not isinstance(record, dict):
        return "JSON of another kind"
    schema = record.get("schema")
    named = isinstance(schema, str) and schema.rpartition("/")[0] == SCHEMA.rpartition("/")[0]
    if named and schema != SCHEMA and record.get(DIGEST, "") in ("", _digest(path, record)):
        other = "it was written by write_safetensors, which records digests alone; verify and report read outputs of mitigate, merge"
        advice = other if str(schema).endswith("/tensors") else "verify it with the version of streamer that wrote it"
        raise FormatError(f"{path}: expected schema {SCHEMA}, found {schema}; {advice}")
    known = {"schema": str, **_TYPES, **{key: kind for key, kind in _OPTIONAL.items() if key in record}}
    wrong = _wrong_key(record, known)
    if DIGEST not in record:  # a digest covers keys that later versions add; without one any other key is damage
        wrong = wrong or next((k for k in record if k not in known), "")
    for key, types in _NESTED.items():
        wrong = wrong or next((f"{key}[].{k}" for entry in record[key] if (k := _wrong_key(entry, types))), "")
    if not wrong and (schema != SCHEMA or record["command"] not in ("merge", "mitigate")):
        wrong = "schema" if schema != SCHEMA else "command"
    return f"{wrong!r} missing, of another kind or unknown" if wrong else record


def _found(output: Path) -> str:
    if (output / JOURNAL_NAME).exists():
        return "the journal of an interrupted run; run its command again"
    inside = sorted(p.parent.name for p in output.glob(f"*/{RECORD_NAME}"))
    named = f"name one of the outputs in it: {', '.join(inside[:3])}" if inside else "is this an output of streamer?"
    return f"none; {named}"


def _wrong_key(entry: object, types: Mapping[str, type | tuple[type, ...]]) -> str:
    if not isinstance(entry, dict):
        return "an entry"
    return next((k for k, kind in types.items() if k not in entry or not isinstance(entry[k], kind)), "")


def check_digest(record: dict[str, Any], outcome: Outcome) -> None:
    """Compare the record with its own digest; if it differs, name the changed key if other files reveal it."""
    path = outcome.output / RECORD_NAME
    if DIGEST in record and record[DIGEST] != (found := _digest(path, record)):
        check_stamps(record, outcome)
        if not outcome.differing(path):
            outcome.misrecorded(f"SHA-256 {record[DIGEST]} by itself", found)


def _digest(path: Path, record: Mapping[str, Any]) -> str:
    """Compute the SHA-256 (hex) of the record's file with zeros in place of the stated digest."""
    return hashlib.sha256(path.read_bytes().replace(str(record.get(DIGEST)).encode(), b"0" * 64, 1)).hexdigest()


def check_record(record: dict[str, Any], outcome: Outcome) -> None:
    """Compare the record's sums and digests with the entries that they summarise."""
    rows, totals = record["matrices"], record["totals"]
    before, after = (math.sqrt(sum(m[key] * m[key] for m in rows)) for key in ("delta_norm", "delta_norm_after"))
    sums = {
        "matrices": len(rows),
        "intruders": sum(len(m["intruders"]) for m in rows),
        "changed": sum(m["delta_norm_after"] != m["delta_norm"] for m in rows),
        "delta_norm": before,
        "delta_norm_after": after,
        "equal_norm_shrink": after / before if before > 0 else 1.0,
        "dropped_max": max((m["dropped"] for m in rows), default=0.0),
        "bytes": sum(f["bytes"] for f in record["files"]),
    }
    # Records of earlier versions lack these.
    sums |= {key: sum(m.get(key, 0) for m in rows) for key in ("values", "rounded_away") if key in totals}
    for key, value in sums.items():
        found = totals.get(key)
        if not isinstance(found, int | float) or not math.isclose(found, value, rel_tol=1e-12):
            outcome.misrecorded(f"totals.{key} {value!r}, the sum over its entries", repr(found))
            break  # other sums may depend on it
    if record["detection"] is not None:
        certified = record["detection"].get("certified")
        if certified != sum(m["certified"] is True for m in rows):
            outcome.misrecorded("detection.certified to count its certified matrices", repr(certified))
    _check_method(record, outcome)
    for key in ("base", "adapter"):
        identity = {k: v for k, v in record[key].items() if k not in (*IN_SHORT, "address", "base_model_name_or_path")}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        if record[key].get("digest") != digest:
            outcome.misrecorded(f"{key}.digest {digest}, the digest of its entry", repr(record[key].get("digest")))


def _check_method(record: dict[str, Any], outcome: Outcome) -> None:
    """Compare the record's detection, λ and intruders with what its method needs."""
    method, lam = record["method"], record["lambda"]
    takes = WITNESSED.get(method)
    detects = takes == "findings" and lam != 1
    taken = {"method": method, "lambda": lam, "detection": record["detection"] is not None, "scale": record["scale"]}
    if takes is None:
        outcome.misrecorded(f"one of the methods {', '.join(WITNESSED)}", repr(method))
        return
    if (
        record["scale"] not in ("all", "first")
        or (lam is None) != (takes == "factors")
        or taken["detection"] != detects
    ):
        outcome.misrecorded("method, lambda, detection and scale that belong together", f"{taken}")
    most = 0 if not detects else 1 if record["scale"] == "first" else math.inf
    for row in record["matrices"]:
        ranks = row["intruders"]
        rising = all(type(j) is int for j in ranks) and ranks == sorted({*ranks}) and min(ranks, default=0) >= 0
        if not rising or len(ranks) > most:
            outcome.misrecorded(f"rising ranks of intruders, {most} at most", f"{ranks}", row["tensor"])


def shards(record: dict[str, Any]) -> list[str]:
    """List the files of the output's own tensors; subdirectories contain other modules' files, which are copied."""
    return [f["file"] for f in record["files"] if f["file"].endswith(".safetensors") and "/" not in f["file"]]


def check_stamps(record: dict[str, Any], outcome: Outcome) -> None:
    """Compare the record with the metadata of each safetensors file about how it was made; missing files are skipped."""
    from safetensors import SafetensorError

    for path in (outcome.output / name for name in shards(record)):
        if not path.is_file() or outcome.differing(path):
            continue
        try:
            with TensorFiles([path]) as file:
                _check_stamp(record, path, file.metadata[path], outcome)
        except SafetensorError as e:
            outcome.differ(path, "a safetensors file", f"{e}")
        if outcome.differing(outcome.output / RECORD_NAME):  # the other files would show the same
            return


def _check_stamp(record: dict[str, Any], file: Path, metadata: Mapping[str, str], outcome: Outcome) -> None:
    try:
        stamp = json.loads(metadata["streamer"])
        items = list(stamp.items())
    except (KeyError, AttributeError, ValueError, RecursionError):
        outcome.differ(file, "metadata that says how it was made", "none that can be read")
        return
    for key, value in items:
        mine = record.get(key)
        if key in ("base", "adapter"):
            mine = {k: str(mine[k]) for k in IN_SHORT if k in mine} if isinstance(mine, dict) else mine
        if mine != value:
            outcome.misrecorded(f"{key} {value!r}, as in the metadata of {file.name}", repr(mine))

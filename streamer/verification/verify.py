"""Verify an output's files by their digests and, if inputs are given, a sample of its matrices or all of its tensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from streamer import errors
from streamer.events import Event, Monitor
from streamer.units import counted
from streamer.verification.checks import FindingsCheck, Opened, OutputCheck, Task, check_rows
from streamer.verification.deltas import CONFIG_NAME, WEIGHTS_NAME, AdapterFiles, read_fit, read_map
from streamer.verification.result import RECORD_NAME, NotRecomputed, Outcome, Verification
from streamer.verification.tensors import TensorFiles

DIGEST = "sha256"
"""Key of the digest that a file states of itself: over all its bytes, with zeros in place of the digest."""

_ANOTHER = "expected an output's directory or findings, found another file; name what streamer wrote"
SCHEMAS = ("streamer.output/2", "streamer.findings/1")
JOURNAL_NAME, CARD_NAME = ".streamer.journal", "README.md"

LOADED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin", "adapter_config.json")
"""Files that a loader takes for weights or for a sign of them; an output may contain only recorded ones."""

NEEDS = {"regmean": "coefficients", "nullspace": "map"}
"""For each method that needs a file, the option that names it."""

SAMPLE_BYTES, PIECE_BYTES = 4096, 1 << 20
"""Bytes in the middle of each tensor that a file's identity digests, and bytes to read at a time."""

Given = Mapping[str, str | Path | None]
Inputs = tuple[str | Path | None, str | Path | None]
Sample = int | Literal["all"]


def verify(output: str | Path, inputs: Inputs, sample: Sample, monitor: Monitor, given: Given) -> Verification:
    """Verify an output; `streamer.verify_output` explains the parameters; `given` are files by the options that name them."""
    path, paths = Path(output), [Path(one) for one in inputs if one is not None]
    if len(paths) == 1:
        raise errors.UsageError("verify: expected BASE and ADAPTER, found one of them; give both, or neither")
    if sample != "all" and (isinstance(sample, bool) or not isinstance(sample, int) or sample < 1):
        raise errors.UsageError(f"sample: expected a count from 1 or 'all', found {sample!r}")
    if not paths and sample == "all":
        raise errors.UsageError("sample: 'all' recomputes matrices from BASE and ADAPTER; give both, or leave it out")
    made, outcome = read_statement(path), Outcome(path, "findings", 1, path.stat().st_size)
    if isinstance(made, str):
        outcome.differ(path / RECORD_NAME if path.is_dir() else path, "a file with the SHA-256 that it states", made)
    else:
        outcome.matrices, base_files = len(made["matrices"]), _check_inputs(paths, made, path)
        if path.is_dir():
            outcome.kind = "model" if made["command"] == "merge" else "adapter"
            _check_files(made, outcome, monitor)
        if paths and not outcome.differences:
            _run(outcome, _open(outcome, made, base_files, paths, given), sample, monitor)
    result = outcome.result({"base": str(inputs[0]), "adapter": str(inputs[1])} if paths else None)
    if outcome.differences:
        first, *more = (difference["message"] for difference in outcome.differences)
        raise errors.VerificationError(f"{first}, and {len(more)} more" if more else first, result)
    if outcome.unmet:
        raise errors.VerificationError(f"{path}: not verified: {outcome.unmet}", result)
    return result


def read_statement(path: Path) -> dict[str, Any] | str:
    """Read an output's record, or a findings' JSON, or return what is found instead of a file with the digest that it states.

    Raises
    ------
    MissingInputError
        If there is no record, so no finished output.
    FormatError
        If it is another file, or of another version's schema.
    """
    is_findings = path.is_file()
    file = path if is_findings else path / RECORD_NAME
    if not file.is_file():
        inside = sorted(p.parent.name for p in path.glob(f"*/{RECORD_NAME}"))
        found = f"none; name one of the outputs in it: {', '.join(inside[:3])}" if inside else "none; check the path"
        if (path / JOURNAL_NAME).exists():
            found = "the journal of an interrupted run; run its command again"
        raise errors.MissingInputError(f"{path}: expected the {RECORD_NAME} of a finished output, found {found}", file)
    if is_findings and path.suffix != ".safetensors":
        raise errors.FormatError(f"{path}: {_ANOTHER}")
    try:
        header: Any = TensorFiles([path]).metadata if is_findings else json.loads(file.read_bytes().decode())
        stated, schema = str(header.get(DIGEST)), header.get("schema")
        tree = json.loads(header["findings"]) if "findings" in header else header
    except (ValueError, AttributeError, RecursionError, errors.FormatError) as e:
        return f"what cannot be read ({e})"
    if is_findings and not {"findings", DIGEST} & header.keys():
        raise errors.FormatError(f"{path}: {_ANOTHER}")
    digest = hashlib.sha256(file.read_bytes().replace(stated.encode(), b"0" * 64, 1)).hexdigest()
    if digest != stated:
        return f"SHA-256 {digest}, and {stated} stated"
    if schema not in SCHEMAS:
        by = "is of write_safetensors, which records digests alone; " if str(schema).endswith("/tensors") else ""
        raise errors.FormatError(f"{file}: {by}found schema {schema}; verify it with the version that wrote it")
    return dict(tree)


def _check_files(record: Mapping[str, Any], outcome: Outcome, monitor: Monitor) -> None:
    """Compare the presence, size and SHA-256 of every file but the model card, which anyone may edit."""
    listed = {outcome.output / entry["file"]: entry for entry in record["files"]}
    for path in sorted(path for pattern in LOADED for path in outcome.output.glob(pattern) if path not in listed):
        outcome.differ(path, f"no such file by {RECORD_NAME}", "one")
    listed.pop(outcome.output / CARD_NAME, None)
    total, outcome.files, outcome.nbytes = sum(entry["bytes"] for entry in listed.values()), len(listed), 0
    for number, (path, entry) in enumerate(listed.items()):
        size, digest = path.stat().st_size if path.is_file() else -1, hashlib.sha256()
        if size != entry["bytes"]:
            outcome.differ(path, f"{entry['bytes']} bytes by {RECORD_NAME}", "no file" if size < 0 else f"{size}")
            continue
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                monitor.checkpoint()
                monitor.emit(Event("verify", path.name, outcome.nbytes, total, number, len(listed)))
                digest.update(piece)
                outcome.nbytes += len(piece)
        if digest.hexdigest() != entry["sha256"]:
            outcome.differ(path, f"SHA-256 {entry['sha256']} by {RECORD_NAME}", digest.hexdigest())
    monitor.emit(Event("verify", "", total, total, len(listed), len(listed)))


def _check_inputs(paths: Sequence[Path], made: Mapping[str, Any], output: Path) -> list[Path]:
    """Refuse a base and an adapter from which the output was not made, and return the base's files; `made` is what it states.

    Raises
    ------
    MissingInputError, MismatchError
        If one is another.
    UnsupportedError
        If the adapter is one of a pipeline.
    """
    files: list[Path] = []
    for path, role in zip(paths, ("base", "adapter"), strict=False):
        stated, advice = made[role], f"give the {role} that {output} was made from"
        if not {"files", "config_sha256"} & stated.keys():
            raise errors.UnsupportedError(f"{output}: outputs of pipelines are not recomputed; leave out BASE ADAPTER")
        own = [{**stated, "file": name} for name in (CONFIG_NAME, WEIGHTS_NAME)]
        for entry in stated.get("files", own):
            file = path if path.is_file() else path / entry["file"]
            if not file.is_file():
                raise errors.MissingInputError(f"{file}: no such file; {advice}", file)
            for key, value in _digests(file, of_adapter=entry in own).items():
                if (wanted := entry[key]) != value:
                    found = f"expected {key} {str(wanted)[:16]}, found {str(value)[:16]}"
                    raise errors.MismatchError(f"{file}: {found}; {advice}")
            files += [file] if role == "base" else []
    return files


def _digests(file: Path, of_adapter: bool) -> dict[str, Any]:
    """Compute a file's size, the digest of its header, and that of this digest and the middle of every tensor.

    Of an adapter's, compute the digest of its config, or of the digest of its header and all tensors.
    """
    if file.name == CONFIG_NAME:
        return {"config_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    with file.open("rb") as f:
        length = f.read(8)
        header = f.read(int.from_bytes(length, "little"))
        start, of_header = 8 + len(header), hashlib.sha256(length + header).hexdigest()
        digest = hashlib.sha256(of_header.encode())
        if of_adapter:
            while piece := f.read(PIECE_BYTES):
                digest.update(piece)
            return {"weights_sha256": digest.hexdigest()}
        places = (tensor["data_offsets"] for name, tensor in json.loads(header).items() if name != "__metadata__")
        for first, last in sorted(places):
            f.seek(start + first + max(0, (last - first - SAMPLE_BYTES) // 2))
            digest.update(f.read(min(SAMPLE_BYTES, last - first)))
    return {"bytes": file.stat().st_size, "header_sha256": of_header, "sample_sha256": digest.hexdigest()}


def _find_file(record: Mapping[str, Any], output: Path, given: Given) -> Path | None:
    """Return the file that a method needs: the given one, or the one of the recorded name beside the output; None if it needs none.

    Raises
    ------
    MissingInputError
        If there is none.
    UsageError
        If a file for another method is given.
    """
    method, name, needed = record["method"], record.get("file") or "recorded file", NEEDS.get(record["method"], "")
    if wrong := [option for option, path in given.items() if path is not None and option != needed]:
        raise errors.UsageError(f"{wrong[0]}: is not needed for an output of method {method!r}; leave it out")
    path = Path(given.get(needed) or output.resolve().parent / name)
    if needed and not path.is_file():
        found = f"expected its {needed}, found no file {path}" if given[needed] else f"found no {name!r} beside it"
        raise errors.MissingInputError(f"{output}: {found}; pass the file with --{needed}", path)
    return path if needed else None


Tasks = tuple[list[Task], list[Task]]
"""An output's matrices, and all other tensors of it and its inputs."""


def _open(outcome: Outcome, made: dict[str, Any], base_files: list[Path], paths: Sequence[Path], given: Given) -> Tasks:
    """Open the inputs and the output."""
    path, is_findings, formula = outcome.output, outcome.kind == "findings", None
    adapter = AdapterFiles(paths[1], paths[0], made["base"].get("architecture"))
    # Subdirectories contain other modules' files, which are copied.
    names = [entry["file"] for entry in made.get("files", ())]
    own = [path / name for name in names if re.fullmatch(r"[^/]+\.safetensors", name)]
    files = AdapterFiles(path) if outcome.kind == "adapter" else TensorFiles(own or [path])
    opened = Opened(outcome, made, TensorFiles(base_files), adapter, files)
    check_rows(opened, path if is_findings else path / RECORD_NAME)
    if file := None if is_findings else _find_file(made, path, given):
        formula = (read_map if "map" in made else read_fit)(file, made)
    check = FindingsCheck(opened) if is_findings else OutputCheck(opened, formula)
    others = [*check.others()] if isinstance(check, OutputCheck) else []
    return [
        (row["tensor"], partial(check.check, row)) for row in _spread(made["matrices"], str(made.get("plan")))
    ], others


def _spread(rows: Sequence[dict[str, Any]], seed: str) -> list[dict[str, Any]]:
    """Sort matrices by digests of their names, one of each kind, then another of each; the seed makes the order repeatable.

    A kind is a name without its numbers: ``layers.N.mlp.up_proj.weight``.
    """
    kinds, ranked = Counter[str](), list[tuple[int, int, dict[str, Any]]]()
    for row in sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row['tensor']}".encode()).digest()):
        kind = re.sub(r"\d+", "N", row["tensor"])
        kinds[kind] += 1
        ranked.append((kinds[kind], len(ranked), row))
    return [row for _, _, row in sorted(ranked)]


def _run(outcome: Outcome, tasks_of: Tasks, sample: Sample, monitor: Monitor) -> None:
    """Recompute matrices until the requested number is done; compare all other tensors if all matrices are requested."""
    matrices, others = tasks_of
    count = len(matrices) if sample == "all" else min(sample, len(matrices))
    total = count + (len(others) if sample == "all" else 0)
    outcome.tensors, done = len(others), 0
    for tasks, end, skipped in ((matrices, count, outcome.not_recomputed), (others, total, outcome.not_compared)):
        for name, task in tasks:
            if done == end:
                break
            monitor.checkpoint()
            monitor.emit(Event("recompute", name, done, total, done, total))
            try:
                error = task()
            except NotRecomputed as e:
                skipped.append({"tensor": name, "reason": str(e)})
                continue
            done += 1
            outcome.compared += error is None
            outcome.recomputed += [] if error is None else [{"tensor": name, "error": min(error, 1e300)}]
        if done < end:
            what = counted(end - done, "matrix" if tasks is matrices else "other tensor")
            outcome.unmet = outcome.unmet or f"{what} cannot be recomputed: {skipped[-1]['reason']}"
            done = end
    monitor.emit(Event("recompute", "", total, total, total, total))

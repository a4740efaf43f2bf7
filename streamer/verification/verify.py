"""Verify an output by its digests and, if inputs are given, by recomputing a sample of its matrices or comparing all of its tensors."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict, cast

import numpy as np

from streamer import errors
from streamer.events import Monitor, Progress
from streamer.json_types import Amount, Count
from streamer.units import counted
from streamer.verification import deltas
from streamer.verification.deltas import (
    FP8,
    AdapterFiles,
    Delta,
    Factors,
    Matrix,
    NotRecomputed,
    TensorFiles,
)

SCHEMA: Final = "streamer.verification/1"
RECORD_NAME = "streamer.json"
"""Name of an output's record, in its directory."""


# fmt: off
class DifferenceRecord(TypedDict):
    """A difference."""
    file: Annotated[str, "Path of the file that differs, or that states something else."]
    tensor: Annotated[str | None, "The tensor that it is about, or null."]
    expected: Annotated[str, "What the record or the inputs state."]
    found: Annotated[str, "What was found."]
    message: Annotated[str, "The line on stderr: file, tensor, expected and found."]

class RecomputedRecord(TypedDict):
    """A matrix that was recomputed."""
    tensor: Annotated[str, "Name of the tensor in the base."]
    error: Annotated[Amount, "The largest error found, as a share of what rounding permits: at most 1 if nothing differs."]

class SkippedRecord(TypedDict):
    """A matrix that was not recomputed, or a tensor that was not compared."""
    tensor: Annotated[str, "Its name; for a matrix, the name of the tensor in the base, followed by [N] in a stack of experts."]
    reason: Annotated[str, "Why not."]

class TotalsRecord(TypedDict):
    """Counts."""
    files: Annotated[Count, "Files that were compared with their digests."]
    bytes: Annotated[Count, "Their bytes."]
    matrices: Annotated[Count, "Matrices that the record lists."]
    recomputed: Annotated[Count, "Matrices that were recomputed."]
    not_recomputed: Annotated[Count, "Matrices that were tried but cannot be recomputed."]
    tensors: Annotated[Count, "Other tensors of the output, and tensors of the inputs that it lacks; 0 without inputs."]
    compared: Annotated[Count, "Of `tensors`, those compared with the inputs, byte by byte or within a rounding; 0 without --sample all."]
    not_compared: Annotated[Count, "Matrices that were not recomputed, and other tensors that were not compared."]
    differences: Annotated[Count, "Differences."]

class _Inputs(TypedDict):
    base: Annotated[str, "The base."]
    adapter: Annotated[str, "The adapter."]

class Verification(TypedDict):
    """What `streamer verify --json` prints, whether it is verified or not (exit code 7)."""
    schema: Literal["streamer.verification/1"]
    output: Annotated[str, "Path of the output, as given."]
    kind: Annotated[Literal["model", "adapter"], "What it is: a merged model, or a mitigated adapter."]
    verified: Annotated[bool, "Whether nothing differs, and everything that was asked for was recomputed and compared."]
    inputs: NotRequired[Annotated[_Inputs, "Paths of base and adapter, as given; absent without them."]]
    totals: Annotated[TotalsRecord, "Counts."]
    recomputed: Annotated[list[RecomputedRecord], "The matrices that were recomputed, with those that differ."]
    not_recomputed: Annotated[list[SkippedRecord], "The matrices that were tried but cannot be recomputed."]
    not_compared: Annotated[list[SkippedRecord], "Other tensors that --sample all could not compare."]
    differences: Annotated[list[DifferenceRecord], "The differences, each listed once."]
# fmt: on


class Outcome:
    """What is found of one output.

    Attributes
    ----------
    result
        The object to print.
    unmet
        What could not be recomputed or compared though it was asked for; empty for nothing.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.unmet = ""
        totals = cast(TotalsRecord, dict.fromkeys(TotalsRecord.__annotations__, 0))
        self.result: Verification = {
            "schema": SCHEMA,
            "output": str(output),
            "kind": "model",
            "verified": False,
            "totals": totals,
            "recomputed": [],
            "not_recomputed": [],
            "not_compared": [],
            "differences": [],
        }

    def differ(self, file: Path, expected: str, found: str, tensor: str | None = None) -> None:
        """Note a difference, which becomes one line."""
        line = f"{file}: {'' if tensor is None else f'tensor {tensor!r}: '}expected {expected}, found {found}"
        record = DifferenceRecord(
            file=str(file), tensor=tensor, expected=expected, found=found, message=line
        )
        self.result["differences"].append(record)


_SPELLINGS = re.compile(
    r"\.modules_to_save(?:\.[^.]+(?=\..))?|(?<=_[AB])\.(?!weight$|bias$)[^.]+|(?<=_delta|vector)\.[^.]+$"
)

SCALING = (
    "use_dora",
    "use_rslora",
    "init_r",
    "alpha",
    "lora_alpha",
    "alpha_pattern",
    "r",
    "rank_pattern",
)
"""Keys of an adapter's config on which its deltas depend, besides its factors."""

Task = tuple[str, Callable[[], float | None]]
"""A tensor, and what recomputes or compares it: it notes differences, and raises `NotRecomputed` if it cannot."""


CASTS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""The format's spelling of a dtype that the record states."""


class Check:
    """Compare the tensors of a merged model or of a mitigated adapter.

    Parameters
    ----------
    formula
        The formula of a method that needs a file.
    """

    def __init__(
        self,
        outcome: Outcome,
        record: dict[str, Any],
        base: TensorFiles,
        adapter: AdapterFiles,
        files: TensorFiles,
        formula: deltas.Formula | None,
    ) -> None:
        self.outcome = outcome
        self.record = record
        self.base = base
        self.adapter = adapter
        self.files = files
        self._formula = formula
        self._rewritten = record.get("to_lora") is not None
        self._rows = {row["tensor"]: row for row in record["matrices"]}
        self._stored = {Matrix(base, tensor).stored_name for tensor in self._rows}
        self._cast = CASTS.get(record.get("dtype", ""))
        self._edits = defaultdict[str, dict[str, str]](dict)
        for entry in record.get("carried", ()):
            self._edits[entry["tensor"]][entry["by"]] = entry["change"]
        plain = deltas.ELEMENTS.keys() - {FP8}
        self._coded = {
            name.rpartition(".")[0]
            for name, tensor in base.stored.items()
            if tensor.dtype not in plain
        }

    def _differ(self, tensor: str, expected: str, found: str) -> None:
        stored = self.files.stored.get(Matrix(self.files, tensor).stored_name)
        self.outcome.differ(
            self.outcome.output if stored is None else stored.path, expected, found, tensor
        )

    def matrix(self, row: dict[str, Any]) -> float:
        """Recompute the matrix of one row of the record, and return the largest error in units of what is permitted."""
        tensor = row["tensor"]
        W0, delta = self.adapter.delta(row, self._source(tensor))
        by_file = self._formula and (self._formula(tensor, delta), 0.0)
        mitigated, spread = by_file or deltas.by_method(self.record, row, W0, delta)
        written = tensor
        if isinstance(self.files, AdapterFiles):
            written = f"base_model.model.{row['module']}.weight"
        if not isinstance(self.files, AdapterFiles) or written in self.files.stored:
            return self._compare(tensor, written, W0, mitigated, spread)
        mine, theirs = (
            files.names(row["module"], W0.stored_shape) for files in (self.files, self.adapter)
        )
        same = (
            deltas.same_bytes(self.files, name, self.adapter, theirs.get(role, ""))
            for role, name in mine.items()
        )
        options = [
            [files.options.get(key) or None for key in SCALING]
            for files in (self.files, self.adapter)
        ]
        copied = (
            bool(mine) and mine.keys() == theirs.keys() and all(same) and options[0] == options[1]
        )
        if copied and mitigated is delta and not self._rewritten:
            return 0.0
        factors = self.files.factors(row["module"], W0.stored_shape)
        wanted_rank = self.record["to_lora"] or delta.terms
        return self._compare_factors(tensor, mitigated, spread, wanted_rank, factors)

    def _source(self, tensor: str) -> Matrix:
        """Return a tensor before its delta: the base's, with the edits that the record lists."""
        matrix = Matrix(self.base, tensor)
        adapter = self.adapter
        for by, change in self._edits[tensor].items():
            if by not in adapter.stored:
                matrix = replace(matrix, name=by)  # a head that was tied to it
            elif change.startswith("plus "):
                matrix = replace(matrix, added=adapter.added_bias(by))
            elif change.endswith(" rows replaced"):
                matrix = replace(matrix, replaced=adapter.token_rows(by))
            else:
                matrix = replace(matrix, files=adapter, name=by)
        return replace(matrix, shape=matrix.stored_shape)

    def _compare(
        self, tensor: str, name: str, W0: Matrix, delta: Delta | None = None, spread: float = 0.0
    ) -> float:
        """Compare ``W0 + Δ'`` with the written tensor of this name, and return the largest error in units of what is permitted.

        Each value may be off by one rounding, and all together by the norm `spread`.
        """
        written = replace(W0, files=self.files, name=name, replaced={}, added=None)
        if W0.dtype not in deltas.ELEMENTS:
            raise NotRecomputed(
                f"it is stored as {W0.dtype or 'several tensors'}, which is not decoded here"
            )
        keeps = (
            delta is not None
            and self.outcome.result["kind"] == "model"
            and not self.record["dequantize"]
        )
        stored = Matrix(self.base, tensor).dtype if keeps or self._cast else ""
        dtypes = {stored, self._cast} if stored else {written.dtype}
        if written.stored_shape != W0.stored_shape or written.dtype not in dtypes:
            expected = f"{' or '.join(sorted(filter(None, dtypes)))} {[*W0.stored_shape]}"
            self._differ(tensor, expected, f"{written.dtype} {[*written.stored_shape]}")
            return math.inf
        # A copy or a cast is exact.
        terms = (
            delta.terms + 8 if delta is not None else 8 * (W0.added is not None or W0.dtype == FP8)
        )
        worst = 0.0
        excess = 0.0
        for i, j in deltas.blocks(W0.shape):
            base = W0.rows(i, j)
            values, bound = (np.zeros((1, 1)),) * 2 if delta is None else delta.rows(i, j)
            slack = terms * 2.0 ** (-53 if W0.dtype == "F64" else -24) * (np.abs(base) + bound)
            error = np.abs(written.rows(i, j) - (base + values))
            rounding = _rounding(written, i, j, np.abs(base + values) + slack) + slack
            worst = max(
                worst,
                float(np.nan_to_num(error / (rounding + spread), nan=np.inf).max(initial=0.0)),
            )
            excess += float(np.sum(np.maximum(error - rounding, 0) ** 2))
        worst = max(worst, math.sqrt(excess) / spread if spread else 0.0)
        if not worst <= 1:
            expected = "W0 + Δ' within one rounding"
            if delta is None:
                expected = "the inputs' values within one rounding"
            self._differ(tensor, expected, f"{worst:.3g} times that")
        return worst

    def _compare_factors(
        self, tensor: str, delta: Delta, spread: float, wanted: float, factors: Factors
    ) -> float:
        """Check that the written ``P = s·B·A`` is a nearest matrix of its rank to Δ', and return the largest error as `_compare` does.

        The rest ``Δ' − P`` is orthogonal to the rows and the columns of P, and no larger than P's least singular value. P has the rank, or
        the share of the energy of Δ', that is asked for.
        """
        P, (half_L, half_R), _ = factors
        if P.shape != delta.shape or not (np.isfinite(P.L).all() and np.isfinite(P.R).all()):
            self._differ(
                tensor, f"finite factors of a matrix of {[*delta.shape]}", f"of {[*P.shape]}"
            )
            return math.inf
        rounding = np.hstack([half_L, np.abs(P.L)]) @ np.hstack([np.abs(P.R) + half_R, half_R]).T
        rest = delta.dense()
        size = float(np.linalg.norm(rest))
        rest -= P.dense()
        columns = P.L.any(0) & P.R.any(0)  # zeros extend factors for servers
        Q, left = np.linalg.qr(P.L[:, columns])
        V, right = np.linalg.qr(P.R[:, columns])
        values = np.linalg.svd(left @ right.T, compute_uv=False)
        powers = np.random.default_rng(0).standard_normal((P.shape[1], 4))
        for _ in range(30):  # they estimate the largest singular value of the rest, from below
            powers = rest.T @ (rest @ np.linalg.qr(powers)[0])
        permitted = 2.02 * np.linalg.norm(rounding) + spread + 1e-6 * size + 1e-300
        padded = isinstance(wanted, int) and self.record.get("for_server") and P.terms >= wanted
        # Factors that do not use their rank must leave nothing.
        used = int(columns.sum())
        rank = wanted if isinstance(wanted, int) else 1
        least = 0.0 if used < min(rank, *P.shape) else float(values[-1])
        beyond = math.sqrt(np.linalg.norm(powers, 2)) - least
        kept = np.sum(values**2) / (size or 1.0) ** 2
        share = float(
            np.max([np.linalg.norm(rest @ V), np.linalg.norm(Q.T @ rest), beyond]) / permitted
        )
        if not share <= 1:
            self._differ(
                tensor, "the nearest factors to Δ' within one rounding", f"{share:.3g} times that"
            )
        elif (
            P.terms != wanted if isinstance(wanted, int) else size and kept < wanted - 1e-3
        ) and not padded:
            self._differ(
                tensor,
                f"factors of rank {wanted}, or of that share of the energy",
                f"{P.terms}, {kept:.4g}",
            )
        return share

    def others(self) -> Iterator[Task]:
        """Yield all other tensors of the output and the inputs."""
        if isinstance(self.files, AdapterFiles):
            return self._others_of_adapter(self.files)
        stored = self.base.stored
        coded = {name for name in self._stored if name in stored and stored[name].dtype == FP8}
        done = self._rows.keys() | {
            name + end for name in coded for end in ("_scale_inv", "_scale")
        }
        names = sorted((self.files.stored.keys() | stored.keys()) - done)
        compare = (
            self._compare_weight,
            self._compare_stack,
        )  # a stack of which some matrices have no row
        return ((name, partial(compare[name in self._stored], name)) for name in names)

    def _compare_weight(self, name: str) -> None:
        """Compare a tensor that no row covers with the base's or the adapter's, or with what the record says that changes in it."""
        files = self.files
        edits = self._edits[name]
        source = self._source(name)
        if self.adapter.is_model and name in self.adapter.stored:
            source = replace(source, files=self.adapter, name=name)
        decoded = self.record["dequantize"] and name.rpartition(".")[0] in self._coded
        if name not in files.stored:
            copies = (
                deltas.same_bytes(self.base, name, self.base, other) for other in files.stored
            )
            stale = "dropped" in edits.values() and (any(copies) or not self.base.raw(name).any())
            if not decoded and not stale:
                self._differ(name, "the base's tensor", "none")
        elif (
            not source.replaced
            and source.added is None
            and deltas.same_bytes(files, name, source.files, source.name)
        ):
            return
        elif edits or decoded:
            self._compare(name, name, source)
        elif self._stored - self.base.stored.keys():
            raise NotRecomputed("a matrix of the record may be built from it")
        elif self._cast:
            self._compare(name, name, source)
        else:
            self._differ(
                name, "the base's bytes" if source.dtype else "a tensor of the inputs", "others"
            )

    def _compare_stack(self, name: str) -> None:
        """Compare the matrices of a stack that have no row with the base's."""
        stored = [files.stored.get(name) for files in (self.files, self.base)]
        if stored[0] is None or stored[1] is None or stored[0][:2] != stored[1][:2]:
            raise NotRecomputed("it is not a tensor of the base and of the output")
        count = stored[0].shape[0]
        mine, theirs = (np.array_split(files.raw(name), count) for files in (self.files, self.base))
        if not all(
            f"{name}[{e}]" in self._rows or np.array_equal(mine[e], theirs[e]) for e in range(count)
        ):
            self._differ(name, "the base's bytes in matrices that have no row", "others")

    def _others_of_adapter(self, files: AdapterFiles) -> Iterator[Task]:
        """Compare tensors without a row with the adapter's of the same name, or, in an adapter of another rank, of any name."""
        adapter = self.adapter
        rows = self._rows.items()
        mine, theirs = (
            {name for roles in of.modules.values() for name in roles.values()}
            for of in (files, adapter)
        )
        shapes = ((row["module"], Matrix(self.base, tensor).stored_shape) for tensor, row in rows)
        own = {name for module, shape in shapes for name in files.names(module, shape).values()}
        saved = {f"base_model.model.{row['module']}.weight" for _, row in rows}
        spelled = set(map(_spelling, files.stored))
        for name in sorted(files.stored.keys() - own - saved):
            yield name, partial(self._find, name, files, adapter, own if name in mine else ())
        for name in sorted(adapter.stored):
            if not self._rewritten and _spelling(name) not in spelled:
                yield name, partial(self._differ, name, "the adapter's tensor", "none")
            elif (
                self._rewritten
                and name not in theirs
                and not re.search(r"original(_module)?(\.|$)", name)
            ):
                yield name, partial(self._find, name, adapter, files)

    def _find(
        self, name: str, files: TensorFiles, others: TensorFiles, factor_names: Collection[str] = ()
    ) -> None:
        """Find a tensor's bytes in the other files; a model's in the base or the rows, a tied module's factor among its names."""
        places = [
            (others, other)
            for other in others.stored
            if self._rewritten or _spelling(other) == _spelling(name)
        ]
        if files is self.adapter and self.adapter.is_model:
            places += [(self.base, name), *((files, row) for row in self._rows)]
        if any(deltas.same_bytes(files, name, place, other) for place, other in places):
            return
        sides = [files.values(name), files.values(name).T] if factor_names else []
        if not any(
            np.array_equal(side, files.values(other)) for other in factor_names for side in sides
        ):
            if factor_names:
                raise NotRecomputed("it is a factor of a module that has no row of its name")
            self._differ(
                name, "the adapter's bytes" if files is self.files else "a copy of it", "none"
            )


def _spelling(name: str) -> str:
    """Return what a tensor's name has in common with PEFT's other spellings of it."""
    return _SPELLINGS.sub("", AdapterFiles.plain_name(name))


def _rounding(written: Matrix, i: int, j: int, largest: deltas.Array) -> deltas.Array:
    """Bound the effect of one rounding to the written dtype on rows of values that are no larger than `largest`."""
    if written.dtype != FP8:
        return deltas.half_spacing(largest, written.dtype)
    scales = written.scales(i, j)
    codes = largest / scales
    # The scale is rounded too, so the block's largest value may slightly exceed the largest code.
    beyond = np.where(
        codes < deltas.LARGEST_FP8 * (1 + 2.0**-8), np.maximum(codes - deltas.LARGEST_FP8, 0), 0
    )
    return np.asarray(np.maximum(deltas.half_spacing(codes, FP8) * (1 + 2.0**-20), beyond) * scales)


DIGEST = "sha256"
"""Key of the digest that a record states of itself: over all its bytes, with zeros in place of the digest."""

OUTPUT_SCHEMA = "streamer.output/2"
JOURNAL_NAME = ".streamer.journal"
CARD_NAME = "README.md"

LOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "adapter_config.json",
)
"""Files that a loader takes for weights or for a sign of them; an output may contain only recorded ones."""

NEEDS = {"regmean": "coefficients", "nullspace": "map"}
"""For each method that needs a file, the option that names it."""

SAMPLE_BYTES = 4096
"""Bytes in the middle of each tensor that a file's identity digests."""

PIECE_BYTES = 1 << 20
"""Bytes to read at a time."""

Given = Mapping[str, str | Path | None]
Inputs = tuple[str | Path | None, str | Path | None]
Sample = int | Literal["all"]


def verify(
    output: str | Path, inputs: Inputs, sample: Sample, monitor: Monitor, given: Given
) -> Verification:
    """Verify an output; `streamer.verify_output` explains the parameters; `given` are files by the options that name them."""
    path = Path(output)
    paths = [Path(given_path) for given_path in inputs if given_path is not None]
    if len(paths) == 1:
        raise errors.UsageError(
            "verify: expected BASE and ADAPTER, found one of them; give both, or neither"
        )
    if not paths and sample == "all":
        raise errors.UsageError(
            "sample: 'all' recomputes matrices from BASE and ADAPTER; give both, or leave it out"
        )
    record = read_record(path)
    outcome = Outcome(path)
    result = outcome.result
    totals = outcome.result["totals"]
    differences = outcome.result["differences"]
    if isinstance(record, str):
        outcome.differ(path / RECORD_NAME, "a file with the SHA-256 that it states", record)
    else:
        base_files = _check_inputs(paths, record, path)
        totals["matrices"] = len(record["matrices"])
        result["kind"] = "model" if record["command"] == "merge" else "adapter"
        _check_files(record, outcome, monitor)
        if paths and not differences:
            _run(outcome, _open(outcome, record, base_files, paths, given), sample, monitor)
    for key in ("recomputed", "not_recomputed", "differences"):
        totals[key] = len(result[key])
    totals["not_compared"] = (
        totals["matrices"] - totals["recomputed"] + totals["tensors"] - totals["compared"]
    )
    result["verified"] = not (differences or outcome.unmet)
    if paths:
        result["inputs"] = {"base": str(inputs[0]), "adapter": str(inputs[1])}
    if differences:
        first, *more = (difference["message"] for difference in differences)
        raise errors.VerificationError(f"{first}, and {len(more)} more" if more else first, result)
    if outcome.unmet:
        raise errors.VerificationError(f"{path}: not verified: {outcome.unmet}", result)
    return result


def read_record(path: Path) -> dict[str, Any] | str:
    """Read an output's record, or return what is found instead of a file with the digest that it states.

    Raises
    ------
    MissingInputError
        If there is no record, so no finished output.
    FormatError
        If it is of another version's schema.
    """
    file = path / RECORD_NAME
    if not file.is_file():
        inside = sorted(p.parent.name for p in path.glob(f"*/{RECORD_NAME}"))
        found = "none; check the path"
        if inside:
            found = f"none; name one of the outputs in it: {', '.join(inside[:3])}"
        if (path / JOURNAL_NAME).exists():
            found = "the journal of an interrupted run; run its command again"
        raise errors.MissingInputError(
            f"{path}: expected the {RECORD_NAME} of a finished output, found {found}", file
        )
    data = file.read_bytes()
    try:
        record: Any = json.loads(data.decode())
        stated = str(record.get(DIGEST))
        schema = record.get("schema")
    except (ValueError, AttributeError, RecursionError) as e:
        return f"what cannot be read ({e})"
    digest = hashlib.sha256(data.replace(stated.encode(), b"0" * 64, 1)).hexdigest()
    if digest != stated:
        return f"SHA-256 {digest}, and {stated} stated"
    if schema != OUTPUT_SCHEMA:
        by = ""
        if str(schema).endswith("/tensors"):
            by = "is of write_safetensors, which records digests alone; "
        raise errors.FormatError(
            f"{file}: {by}found schema {schema}; verify it with the version that wrote it"
        )
    return dict(record)


def _check_files(record: Mapping[str, Any], outcome: Outcome, monitor: Monitor) -> None:
    """Compare the presence, size and SHA-256 of every file but the model card, which anyone may edit."""
    listed = {outcome.output / entry["file"]: entry for entry in record["files"]}
    for path in sorted(
        path for pattern in LOADED for path in outcome.output.glob(pattern) if path not in listed
    ):
        outcome.differ(path, f"no such file by {RECORD_NAME}", "one")
    listed.pop(outcome.output / CARD_NAME, None)
    total = sum(entry["bytes"] for entry in listed.values())
    totals = outcome.result["totals"]
    progress = Progress(monitor, "verify", total, len(listed))
    totals["files"] = len(listed)
    totals["bytes"] = 0
    for path, entry in listed.items():
        size = path.stat().st_size if path.is_file() else -1
        digest = hashlib.sha256()
        if size != entry["bytes"]:
            outcome.differ(
                path,
                f"{entry['bytes']} bytes by {RECORD_NAME}",
                "no file" if size < 0 else f"{size}",
            )
            progress.add(0)
            continue
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                progress.begin(path.name)
                digest.update(piece)
                progress.add(len(piece), 0)
                totals["bytes"] += len(piece)
        progress.add(0)
        if digest.hexdigest() != entry["sha256"]:
            outcome.differ(path, f"SHA-256 {entry['sha256']} by {RECORD_NAME}", digest.hexdigest())
    progress.end()


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
        stated = made[role]
        advice = f"give the {role} that {output} was made from"
        if not {"files", "config_sha256"} & stated.keys():
            raise errors.UnsupportedError(
                f"{output}: outputs of pipelines are not recomputed; leave out BASE ADAPTER"
            )
        own = [{**stated, "file": name} for name in (deltas.CONFIG_NAME, deltas.WEIGHTS_NAME)]
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
    if file.name == deltas.CONFIG_NAME:
        return {"config_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    with file.open("rb") as f:
        length = f.read(8)
        header = f.read(int.from_bytes(length, "little"))
        start = 8 + len(header)
        of_header = hashlib.sha256(length + header).hexdigest()
        digest = hashlib.sha256(of_header.encode())
        if of_adapter:
            return {"weights_sha256": hashlib.file_digest(f, lambda: digest).hexdigest()}
        places = (
            tensor["data_offsets"]
            for name, tensor in json.loads(header).items()
            if name != "__metadata__"
        )
        for first, last in sorted(places):
            f.seek(start + first + max(0, (last - first - SAMPLE_BYTES) // 2))
            digest.update(f.read(min(SAMPLE_BYTES, last - first)))
    return {
        "bytes": file.stat().st_size,
        "header_sha256": of_header,
        "sample_sha256": digest.hexdigest(),
    }


def _find_file(record: Mapping[str, Any], output: Path, given: Given) -> Path | None:
    """Return the file that a method needs: the given one, or the one of the recorded name beside the output; None if it needs none.

    Raises
    ------
    MissingInputError
        If there is none.
    UsageError
        If a file for another method is given.
    """
    method = record["method"]
    name = record.get("file") or "recorded file"
    needed = NEEDS.get(record["method"], "")
    if wrong := [option for option, path in given.items() if path is not None and option != needed]:
        raise errors.UsageError(
            f"{wrong[0]}: is not needed for an output of method {method!r}; leave it out"
        )
    path = Path(given.get(needed) or output.resolve().parent / name)
    if needed and not path.is_file():
        found = f"found no {name!r} beside it"
        if given[needed]:
            found = f"expected its {needed}, found no file {path}"
        raise errors.MissingInputError(f"{output}: {found}; pass the file with --{needed}", path)
    return path if needed else None


Tasks = tuple[list[Task], list[Task]]
"""An output's matrices, and all other tensors of it and its inputs."""


def _open(
    outcome: Outcome,
    record: dict[str, Any],
    base_files: list[Path],
    paths: Sequence[Path],
    given: Given,
) -> Tasks:
    """Open the inputs and the output."""
    path = outcome.output
    formula = None
    adapter = AdapterFiles(paths[1], paths[0], record["base"].get("architecture"))
    # Subdirectories contain other modules' files, which are copied.
    names = [entry["file"] for entry in record["files"]]
    own = [path / name for name in names if re.fullmatch(r"[^/]+\.safetensors", name)]
    files = AdapterFiles(path) if outcome.result["kind"] == "adapter" else TensorFiles(own)
    # ``experts.down_proj[0]`` is one of the matrices of ``experts``. Of tied modules only one has a row.
    listed = {re.sub(r"\.[^.]+\[\d+\]$", "", row["module"]) for row in record["matrices"]}
    for module, roles in adapter.modules.items():
        shared = adapter.options.get("ensure_weight_tying") or roles.keys() <= {"vera_A", "vera_B"}
        if deltas.unwrapped(module) not in listed and not shared:
            outcome.differ(
                path / RECORD_NAME, f"a row for {module!r}, which the adapter changes", "none"
            )
    if file := _find_file(record, path, given):
        formula = (deltas.read_map if "map" in record else deltas.read_fit)(file, record)
    check = Check(outcome, record, TensorFiles(base_files), adapter, files, formula)
    rows = _spread(record["matrices"], str(record.get("plan")))
    return [(row["tensor"], partial(check.matrix, row)) for row in rows], [*check.others()]


def _spread(rows: Sequence[dict[str, Any]], seed: str) -> list[dict[str, Any]]:
    """Sort matrices by digests of their names, one of each kind, then another of each; the seed makes the order repeatable.

    A kind is a name without its numbers: ``layers.N.mlp.up_proj.weight``.
    """
    kinds = Counter[str]()
    ranked = list[tuple[int, int, dict[str, Any]]]()
    for row in sorted(
        rows, key=lambda row: hashlib.sha256(f"{seed} {row['tensor']}".encode()).digest()
    ):
        kind = re.sub(r"\d+", "N", row["tensor"])
        kinds[kind] += 1
        ranked.append((kinds[kind], len(ranked), row))
    return [row for _, _, row in sorted(ranked)]


def _run(outcome: Outcome, tasks_of: Tasks, sample: Sample, monitor: Monitor) -> None:
    """Recompute matrices until the requested number is done; compare all other tensors if all matrices are requested."""
    matrices, others = tasks_of
    result = outcome.result
    count = len(matrices) if sample == "all" else min(sample, len(matrices))
    total = count + (len(others) if sample == "all" else 0)
    progress = Progress(monitor, "recompute", total, total)
    result["totals"]["tensors"] = len(others)
    for tasks, end, skipped in (
        (matrices, count, result["not_recomputed"]),
        (others, total, result["not_compared"]),
    ):
        for name, task in tasks:
            if progress.done == end:
                break
            progress.begin(name)
            try:
                error = task()
            except NotRecomputed as e:
                skipped.append({"tensor": name, "reason": str(e)})
                continue
            progress.add(1)
            result["totals"]["compared"] += error is None
            result["recomputed"] += (
                [] if error is None else [{"tensor": name, "error": min(error, 1e300)}]
            )
        if left := end - progress.done:
            what = counted(left, "matrix" if tasks is matrices else "other tensor")
            outcome.unmet = outcome.unmet or f"{what} cannot be recomputed: {skipped[-1]['reason']}"
            progress.add(left, left)
    progress.end()

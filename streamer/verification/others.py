"""Compare the tensors that no row of the record recomputes with the inputs': byte by byte, or within the one rounding of writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np

from streamer.verification.formulas import WEIGHTS_NAME, AdapterFiles
from streamer.verification.inventory import Part, parts, stored_name
from streamer.verification.result import NotRecomputed, Outcome
from streamer.verification.rounding import computing_precision, half_spacing
from streamer.verification.tensors import BLOCK_BYTES, FLOATS, FP8, Array, TensorFiles, open_matrix, same_bytes

Comparison = Callable[[], None]


@dataclass(frozen=True)
class MergedTensors:
    """Compare the tensors of a merged model that are none of the record's matrices.

    Attributes
    ----------
    outcome
        Takes the differences.
    record
        The output's ``streamer.json``.
    base, adapter, files
        The inputs and the output, opened.
    carried
        The model's tensor → the adapter's that edits it (see `check_carried`).
    """

    outcome: Outcome
    record: dict[str, Any]
    base: TensorFiles
    adapter: AdapterFiles
    files: TensorFiles
    carried: dict[str, Part]

    def comparisons(self) -> Iterator[tuple[str, Comparison]]:
        """Yield each tensor with its comparison, which raises `NotRecomputed` if nothing here can compare it."""
        rows = {stored_name(row["tensor"]) for row in self.record["matrices"]}
        built = tuple(
            _container(row["tensor"])
            for row in self.record["matrices"]
            if stored_name(row["tensor"]) not in self.base.all_names | self.carried.keys()
        )
        scales = {f"{row}{end}" for row in rows if row in self.base and self.base.stored(row).dtype == FP8
                  for end in ("_scale_inv", "_scale")}  # fmt: skip
        for name in sorted(self.files.all_names - rows - scales):
            yield name, partial(self._compare, name, name.startswith(built))
        for name in sorted(self.base.all_names - self.files.all_names - rows - scales):
            yield name, partial(self._missing, name)

    def _compare(self, name: str, built: bool) -> None:
        part = self.carried.get(name)
        if part is None and name in self.base and same_bytes(self.files, name, self.base, name):
            return
        if part is not None:
            self._compare_carried(name, part)
        elif built:
            raise NotRecomputed("a matrix of the record may be built from it")
        elif name in self.base and self.files.stored(name) == self.base.stored(name):
            self._differ(name, "the base's bytes")
        elif not self.record["dequantize"]:
            self._differ(name, "a tensor of the base, or one that the adapter brings")
        elif name in self.base and self.base.stored(name).dtype == FP8:
            W0 = open_matrix(self.base, name, self.base.stored(name).shape, False)  # type: ignore[arg-type]
            written = open_matrix(self.files, name, W0.shape, False)
            for i, j in W0.blocks():
                self._check_rounding(name, written.rows(i, j), W0.rows(i, j), 0.0)
        else:
            raise NotRecomputed("it is decoded from an encoding that is not decoded here")

    def _compare_carried(self, name: str, part: Part) -> None:
        source = self.base if part.role == "tied" else self.adapter.files
        if part.role in ("saved", "tied"):
            if same_bytes(self.files, name, source, part.source):
                return
            written, given = self.files.stored(name), source.stored(part.source)
            if written.shape != given.shape or {written.dtype, given.dtype} - {*FLOATS} or written.dtype == given.dtype:
                self._differ(name, f"the bytes of {part.source!r}")
                return
            for i, j in _blocks(written.shape):
                self._check_rounding(name, self.files.some(name, i, j), source.some(part.source, i, j), 0.0)
            return
        base = self.base
        if name not in base or base.stored(name) != self.files.stored(name):
            self._differ(name, "dtype and shape as in the base")
        elif part.role == "lora_bias":
            added = self.adapter.bias_scaling(part.target) * source.whole(part.source)
            exact = base.whole(name)
            slack = 4 * computing_precision(base.stored(name).dtype) * (np.abs(exact) + np.abs(added))
            self._check_rounding(name, self.files.whole(name), exact + added, slack)
        else:
            self._compare_tokens(name, part)

    def _compare_tokens(self, name: str, part: Part) -> None:
        """Compare trained rows with the adapter's, and all others byte by byte."""
        rows, source = self.adapter.token_rows(part.target), self.adapter.files
        shape = self.base.stored(name).shape
        trained = np.zeros(shape[0], bool)
        trained[rows] = True
        for at, row in enumerate(rows):
            self._check_rounding(name, self.files.some(name, row, row + 1), source.some(part.source, at, at + 1), 0.0)
        width, start = -(-self.base.nbytes(name) // shape[0]), 0
        for mine, theirs in zip_longest(self.files.pieces(name), self.base.pieces(name)):
            apart = np.flatnonzero(np.frombuffer(mine, np.uint8) != np.frombuffer(theirs, np.uint8)) + start
            if not trained[apart // width].all():
                row = int(next(r for r in apart // width if not trained[r]))
                self._differ(name, f"the base's bytes in row {row}, which no token replaces")
                return
            start += len(mine)

    def _missing(self, name: str) -> None:
        """Judge a tensor of the base that the output does not have."""
        if any(c["tensor"] == name and c["change"] == "dropped" for c in self.record["carried"]):
            zero = not any(any(piece) for piece in self.base.pieces(name))
            copies = (other for other in self.base.all_names - {name} if same_bytes(self.base, name, self.base, other))
            if not zero and not any(copies):
                self._differ(name, "a copy of another tensor, or zeros, to be left out")
            return
        if self.record["dequantize"]:
            raise NotRecomputed("it belongs to quantized values")
        self._differ(name, "the base's tensor", "none")

    def _check_rounding(self, name: str, written: Array, exact: Array, slack: Array | float) -> None:
        """Compare values with exact ones within one rounding to the written dtype and what computing them in less precision adds."""
        permitted = half_spacing(np.abs(exact) + slack, self.files.stored(name).dtype) + slack
        if not (np.abs(written - exact) <= permitted).all():
            self._differ(name, "the adapter's values within one rounding")

    def _differ(self, name: str, expected: str, found: str = "others") -> None:
        if not any(d["tensor"] == name for d in self.outcome.differences):
            path = next((p for p, names in self.files.names.items() if name in names), self.outcome.output)
            self.outcome.differ(path, expected, found, name)


@dataclass(frozen=True)
class AdapterTensors:
    """Compare the tensors of a written adapter that are no factors; see `MergedTensors`."""

    outcome: Outcome
    record: dict[str, Any]
    base: TensorFiles
    adapter: AdapterFiles
    files: AdapterFiles

    def comparisons(self) -> Iterator[tuple[str, Comparison]]:
        """Yield each tensor with its comparison."""
        theirs = self.adapter.files
        rewritten = self.record["to_lora"] is not None
        # A method without factors to write back is written as it was read.
        copied = not rewritten and self.adapter.config.get("peft_type", "LORA") != "LORA"
        roles = {part.source: part.role for part in parts(self.files)}
        recomputed = {self.files.saved_weight(row["module"]) for row in self.record["matrices"]}
        others = [name for name, role in roles.items() if (copied or role != "factor") and name not in recomputed]
        if not rewritten:
            for name in sorted(roles.keys() ^ theirs.all_names):
                self._differ(name, "the names of the adapter's tensors", "one more" if name in roles else "none")
        named = {f"base_model.model.{self.adapter.plain_name(n)}": n for n in theirs.all_names} if rewritten else {}
        for name in sorted(others):
            if self.adapter.is_model:
                yield name, partial(self._compare_tuned, name)
            else:
                yield name, partial(self._compare, name, named.get(name, name))
        if rewritten:
            for part in sorted(parts(self.adapter)):
                if part.role not in ("factor", "shared"):
                    yield part.source, partial(self._find, part, others)

    def _compare(self, name: str, other: str) -> None:
        if other not in self.adapter.files or not same_bytes(self.files.files, name, self.adapter.files, other):
            self._differ(name, "the adapter's bytes")

    def _compare_tuned(self, name: str) -> None:
        """Look a tensor of the fine-tuned model up by its bytes: PEFT's name of it may be another."""
        theirs = self.adapter.files
        first = self.adapter.plain_name(name)
        others = (*(n for n in [first] if n in theirs), *theirs.all_names)
        if not any(same_bytes(self.files.files, name, theirs, other) for other in others):
            self._differ(name, "the bytes of a tensor of the fine-tuned model")

    def _find(self, part: Part, others: list[str]) -> None:
        """Find what the output has of a tensor that the adapter brings, or that a fine-tuned model changed."""
        if self.adapter.is_model:
            rows = {row["tensor"] for row in self.record["matrices"]}
            if part.source in rows or stored_name(part.source) in rows:
                return
            if part.source in self.base and same_bytes(self.base, part.source, self.adapter.files, part.source):
                return
        elif part.role == "original":
            return
        if not any(same_bytes(self.files.files, name, self.adapter.files, part.source) for name in others):
            self._differ(part.source, "a copy of it in the output", "none")

    def _differ(self, name: str, expected: str, found: str = "others") -> None:
        self.outcome.differ(self.outcome.output / WEIGHTS_NAME, expected, found, name)


def _container(tensor: str) -> str:
    """Return how the names of all tensors begin that a matrix may be built from: those of its module's parent, or of all experts."""
    return stored_name(tensor).removesuffix(".weight").rpartition(".")[0] + "."


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    rows, step = (shape or (1,))[0], max(1, BLOCK_BYTES // (8 * max(1, math.prod(shape[1:]))))
    return ((i, min(rows, i + step)) for i in range(0, rows, step))

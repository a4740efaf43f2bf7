"""Compare the tensors that no row of the record covers with the inputs': byte by byte, or within one rounding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import numpy as np

from streamer.verification.formulas import WEIGHTS_NAME, AdapterFiles
from streamer.verification.inventory import Part, check_mirrors, parts, stored_name
from streamer.verification.result import NotRecomputed, Outcome
from streamer.verification.rounding import computing_precision, half_spacing
from streamer.verification.tensors import FLOATS, FP8, Array, TensorFiles, open_matrix, row_blocks, same_bytes

Comparison = Callable[[], None]


@dataclass(frozen=True)
class MergedTensors:
    """Compare a merged model's tensors other than the record's matrices.

    Attributes
    ----------
    outcome
        Collects the differences.
    record
        The output's ``streamer.json``.
    base, adapter, files
        The open inputs and output.
    carried
        The model's tensor → the adapter's tensors that edit it (see `check_carried`).
    """

    outcome: Outcome
    record: dict[str, Any]
    base: TensorFiles
    adapter: AdapterFiles
    files: TensorFiles
    carried: dict[str, list[Part]]

    def comparisons(self) -> Iterator[tuple[str, Comparison]]:
        """Yield each tensor with its comparison, which raises `NotRecomputed` if it cannot be compared here."""
        rows = {stored_name(row["tensor"]) for row in self.record["matrices"]}
        scales = {f"{row}{end}" for row in rows if row in self.base and self.base.stored(row).dtype == FP8
                  for end in ("_scale_inv", "_scale")}  # fmt: skip
        built = self._built(rows - self.base.all_names - self.carried.keys())
        for name in sorted(self.files.all_names - rows - scales):
            yield name, partial(self._compare, name, name in built)
        for name in sorted(self.base.all_names - self.files.all_names - rows - scales):
            yield name, partial(self._missing, name)

    def _built(self, rows: set[str]) -> set[str]:
        """Find base tensors from which matrices missing in the base may be built, by layer and module.

        ``model.layers.0.mlp.experts.gate_up_proj`` → ``model.layers.0.block_sparse_moe.experts.3.w1.weight``.
        """
        places: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
        for name in self.base.all_names if rows else ():
            pieces = name.split(".")
            for i, piece in enumerate(pieces):
                above = tuple(p for p in pieces[:i] if p.isdigit())
                places[piece, *above].add(name)
                places[above].add(name)
        found: set[str] = set()
        for row in rows:
            *path, module = row.removesuffix(".weight").rpartition(".")[0].split(".")
            numbers = tuple(piece for piece in path if piece.isdigit())
            found |= places.get((module, *numbers)) or places.get(numbers) or set()
        return found

    def _compare(self, name: str, built: bool) -> None:
        if name in self.carried:
            self._compare_carried(name, self.carried[name])
        elif name in self.base and same_bytes(self.files, name, self.base, name):
            return
        elif built:
            raise NotRecomputed("a matrix of the record may be built from it")
        elif name in self.base and self.files.stored(name) == self.base.stored(name):
            self._differ(name, "the base's bytes")
        elif self._decodes(name):
            self._compare_decoded(name, frozenset())
        else:
            self._differ(name, "a tensor of the base, or one that the adapter brings")

    def _decodes(self, name: str) -> bool:
        """Test whether a tensor holds quantized values of the base, decoded."""
        return self._is_decoded(name) and not (name in self.base and self.base.stored(name).dtype in FLOATS)

    def _compare_decoded(self, name: str, apart: frozenset[int]) -> None:
        """Compare all rows except those in `apart` with the decoded values of the base."""
        if name not in self.base or self.base.stored(name).dtype != FP8:
            raise NotRecomputed("its encoding is not decoded here")
        W0 = open_matrix(self.base, name, self.base.stored(name).shape, False)  # type: ignore[arg-type]
        written = open_matrix(self.files, name, W0.shape, False)
        for i, j in W0.blocks():
            at = [row - i for row in range(i, j) if row not in apart]
            self._check_rounding(name, written.rows(i, j)[at], W0.rows(i, j)[at])

    def _compare_carried(self, name: str, edits: list[Part]) -> None:
        """Compare a tensor with the adapter's replacement, with the bias added to it, or with the rows replaced in it."""
        first, last = edits[0], edits[-1]
        source, start = self.base, name
        if first.role in ("saved", "tied"):
            source, start = self.base if first.role == "tied" else self.adapter.files, first.source
        written = self.files.stored(name)
        if source is self.base and last.role == "tokens" and self._decodes(name):
            self._compare_decoded(name, self._compare_tokens(name, last))
        elif start not in source or source.stored(start).shape != written.shape:
            self._differ(name, f"the shape of {start!r}")
        elif last.role == "lora_bias":
            added = self.adapter.bias_scaling(last.target) * self.adapter.files.whole(last.source)
            exact = source.whole(start)
            slack = 4 * computing_precision(source.stored(start).dtype) * (np.abs(exact) + np.abs(added))
            self._check_rounding(name, self.files.whole(name), exact + added, slack)
        elif last.role == "tokens":
            self._compare_rows(name, source, start, self._compare_tokens(name, last))
        elif not same_bytes(self.files, name, source, start):
            if {written.dtype, source.stored(start).dtype} - {*FLOATS} or written.dtype == source.stored(start).dtype:
                self._differ(name, f"the bytes of {start!r}")
            else:
                self._compare_rows(name, source, start, frozenset())

    def _compare_tokens(self, name: str, tokens: Part) -> frozenset[int]:
        """Compare the rows of trained tokens, and return their numbers."""
        rows = self.adapter.token_rows(tokens.target)
        for at, row in enumerate(rows):
            exact = self.adapter.files.some(tokens.source, at, at + 1)
            self._check_rounding(name, self.files.some(name, row, row + 1), exact)
        return frozenset(rows)

    def _compare_rows(self, name: str, source: TensorFiles, start: str, apart: frozenset[int]) -> None:
        """Compare all rows except those in `apart`: byte by byte, or within one rounding if they were cast."""
        shape = self.files.stored(name).shape
        if source.stored(start) != self.files.stored(name):
            for i, j in row_blocks(shape):
                at: Any = [row - i for row in range(i, j) if row not in apart] if shape else ...
                self._check_rounding(name, self.files.some(name, i, j)[at], source.some(start, i, j)[at])
            return
        width, begun = source.nbytes(start) // shape[0], 0
        for mine, theirs in zip_longest(self.files.pieces(name), source.pieces(start)):
            different = np.flatnonzero(np.frombuffer(mine, np.uint8) != np.frombuffer(theirs, np.uint8)) + begun
            if rows := {*(different // width).tolist()} - apart:
                self._differ(name, f"the bytes of {start!r} in row {min(rows)}")
                return
            begun += len(mine)

    def _missing(self, name: str) -> None:
        """Check a tensor of the base that the output does not have."""
        if any(c["tensor"] == name and c["change"] == "dropped" for c in self.record["carried"]):
            mine, shape = self.files.all_names & self.base.all_names, self.base.stored(name).shape
            resized = {
                self.base.stored(n).shape[:1] for n in mine if self.base.stored(n).shape != self.files.stored(n).shape
            }
            # All zeros with one entry for each token of a resized vocabulary, or a copy of a tensor tied to it.
            stale = any((n,) in resized for n in shape) and not any(any(piece) for piece in self.base.pieces(name))
            if not stale and not any(same_bytes(self.base, name, self.base, other) for other in mine):
                self._differ(name, "the base's tensor, which is not a copy of another", "none")
            return
        if self._is_decoded(name):
            raise NotRecomputed("it belongs to quantized values")
        self._differ(name, "the base's tensor", "none")

    def _is_decoded(self, name: str) -> bool:
        """Test whether the base has quantized values in this tensor's module, which ``--dequantize`` would decode."""
        home = name.rpartition(".")[0]
        return bool(self.record["dequantize"]) and home in self._quantized

    @cached_property
    def _quantized(self) -> frozenset[str]:
        """Return the base's tensors of quantized values and the modules that contain them."""
        codes = [name for name in self.base.all_names if self.base.stored(name).dtype not in FLOATS]
        return frozenset((*codes, *(name.rpartition(".")[0] for name in codes)))

    def _check_rounding(self, name: str, written: Array, exact: Array, slack: Array | float = 0.0) -> None:
        """Check values within one rounding to the written dtype, plus the slack of computing in lower precision."""
        permitted = half_spacing(np.abs(exact) + slack, self.files.stored(name).dtype) + slack
        if not (np.abs(written - exact) <= permitted).all():
            self._differ(name, "the adapter's values within one rounding")

    def _differ(self, name: str, expected: str, found: str = "others") -> None:
        if not any(d["tensor"] == name for d in self.outcome.differences):
            path = next((p for p, names in self.files.names.items() if name in names), self.outcome.output)
            self.outcome.differ(path, expected, found, name)


@dataclass(frozen=True)
class AdapterTensors:
    """Compare a written adapter's tensors other than factors; see `MergedTensors`."""

    outcome: Outcome
    record: dict[str, Any]
    base: TensorFiles
    adapter: AdapterFiles
    files: AdapterFiles

    def comparisons(self) -> Iterator[tuple[str, Comparison]]:
        """Yield each tensor with its comparison."""
        theirs = self.adapter.files
        check_mirrors(self.record["matrices"], self.files, self.outcome.output / WEIGHTS_NAME, self.outcome)
        rewritten = self.record["to_lora"] is not None
        # An adapter of a method without writable factors is copied.
        copied = not rewritten and self.adapter.config.get("peft_type", "LORA") != "LORA"
        roles = {part.source: part.role for part in parts(self.files)}
        recomputed = {self.files.saved_weight(row["module"]) for row in self.record["matrices"]}
        others = [name for name, role in roles.items() if (copied or role != "factor") and name not in recomputed]
        named = {name: name for name in theirs.all_names} if copied else self.adapter.saved_names()
        for name in [] if rewritten else sorted(roles.keys() ^ named.keys()):
            self._differ(name, "the names of the adapter's tensors", "one more" if name in roles else "none")
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
        """Search for a tensor of the fine-tuned model by its bytes, because PEFT may use another name."""
        theirs = self.adapter.files
        first = self.adapter.plain_name(name)
        others = (*(n for n in [first] if n in theirs), *theirs.all_names)
        if not any(same_bytes(self.files.files, name, theirs, other) for other in others):
            self._differ(name, "the bytes of a tensor of the fine-tuned model")

    def _find(self, part: Part, others: list[str]) -> None:
        """Search the output for a tensor that the adapter contains or that a fine-tuned model changed."""
        if self.adapter.is_model:
            rows = {stored_name(row["tensor"]) for row in self.record["matrices"]} & self.adapter.files.all_names
            unchanged = part.source in self.base and same_bytes(self.base, part.source, self.adapter.files, part.source)
            # A copy of a tied matrix does not count as a tensor of its own.
            if unchanged or any(same_bytes(self.adapter.files, row, self.adapter.files, part.source) for row in rows):
                return
        elif part.role == "original":
            return
        if not any(same_bytes(self.files.files, name, self.adapter.files, part.source) for name in others):
            self._differ(part.source, "a copy of it in the output", "none")

    def _differ(self, name: str, expected: str, found: str = "others") -> None:
        self.outcome.differ(self.outcome.output / WEIGHTS_NAME, expected, found, name)

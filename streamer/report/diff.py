"""Determine the fate of each intruder between two findings on one base: after mitigation, or between two checkpoints.

Both findings contain the intruders' left singular vectors, ``U`` (m, q) and ``U'`` (m, q'), each orthonormal. An intruder u matches u' if
``⟨u, u'⟩² > 1/2``: each then lies by more than half along the other, so neither can have a second match.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final, Literal, TypedDict, cast

import torch

from streamer.detection.findings import Findings, MatrixFinding
from streamer.detection.options import OptionsRecord
from streamer.errors import MismatchError
from streamer.json_types import Count, Share
from streamer.tables import Column
from streamer.units import counted

SCHEMA: Final = "streamer.diff/1"

MATCHED = 0.5
"""Squared overlap above which two directions count as the same."""

Fate = Literal["kept", "mixed", "gone", "new"]
FATES: tuple[Fate, ...] = ("kept", "mixed", "gone", "new")


def fates_counted(totals: _DiffTotals) -> str:
    """Format the number of intruders of each fate."""
    return ", ".join(f"{totals[fate]} {'remain' if fate == 'kept' else fate}" for fate in FATES)


# fmt: off
@dataclass(frozen=True)
class Direction:
    """An intruder in one of the findings."""
    rank: Annotated[Count, "0-based, among the singular directions of base + delta."]
    singular_value: Annotated[float, "Its singular value."]
    similarity: Annotated[float, "Its similarity to the base, as used for the decision."]

@dataclass(frozen=True)
class IntruderFate:
    """What became of an intruder."""
    tensor: Annotated[str, "Name of the matrix in the base."]
    fate: Annotated[Fate, "What became of it; see `totals`."]
    before: Annotated[Direction | None, "The intruder in the first findings; null for a new one."]
    after: Annotated[Direction | None, "The intruder in the second findings; null if none matches."]
    overlap: Annotated[Share, "Absolute inner product with the nearest intruder of the other findings in this matrix, or 0."]
    share: Annotated[Share, "Its squared part in the span of the other findings' intruders of this matrix."]

    @property
    def sides(self) -> list[str]:
        """Format its rank and singular value in the first and in the second findings."""
        found = ((str(d.rank + 1), f"{d.singular_value:#.4g}") if d else ("-", "-") for d in (self.before, self.after))
        return [text for side in found for text in side]

class DiffSide(TypedDict):
    """One of the two findings."""
    adapter: Annotated[str | None, "Name of the adapter; null if the findings do not say."]
    options: Annotated[OptionsRecord, "Options of the detection, as in streamer.findings/1."]
    intruders: Annotated[Count, "Intruders in all matrices."]

class _DiffTotals(TypedDict):
    matrices: Annotated[Count, "Matrices that both findings have."]
    kept: Annotated[Count, "Intruders of the first findings that match one of the second."]
    mixed: Annotated[Count, "Intruders of the first findings that match none, but lie by more than half in the span of the second's."]
    gone: Annotated[Count, "Intruders of the first findings that the second do not have."]
    new: Annotated[Count, "Intruders of the second findings that the first do not have."]

class DiffRecord(TypedDict):
    """What `streamer diff --json` prints: what became of each intruder between two findings on one base."""
    schema: Literal["streamer.diff/1"]
    first: Annotated[DiffSide, "The first findings."]
    second: Annotated[DiffSide, "The second findings."]
    totals: Annotated[_DiffTotals, "Counts over the matrices that both findings have."]
    notes: Annotated[list[str], "Limits of the comparison: different options, decisions that are not certified."]
    only_first: Annotated[list[str], "Matrices that only the first findings have."]
    only_second: Annotated[list[str], "Matrices that only the second findings have."]
    intruders: Annotated[list[dict[str, Any]], IntruderFate, "Each intruder, by matrix, new ones last; ranks are 0-based."]
# fmt: on


@dataclass(frozen=True, repr=False)
class FindingsDiff:
    """Fates of the intruders between two findings.

    Attributes
    ----------
    intruders
        By matrix, each intruder of the first findings, then the new ones. An intruder of the second findings that matches none of the
        first but lies mostly in their span is not listed.
    matrices
        Number of matrices that both findings have.
    only_first, only_second
        Matrices that only one of the findings has; their intruders are not listed.
    first, second
        Adapter, options and number of intruders of the two findings.
    notes
        Limits of the comparison: different options, decisions that are not certified.
    """

    intruders: tuple[IntruderFate, ...]
    matrices: int
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    first: DiffSide
    second: DiffSide
    notes: tuple[str, ...]

    def count(self, fate: Fate) -> int:
        """Return the number of intruders with this fate."""
        return Counter(one.fate for one in self.intruders)[fate]

    def columns(self, shown: Sequence[IntruderFate]) -> list[Column]:
        """Make the columns of a table of some intruders."""
        sides = [one.sides for one in shown]
        return [
            Column("matrix", [one.tensor for one in shown], left=True, names=True, among=[one.tensor for one in self.intruders]),
            Column("fate", ["remains" if one.fate == "kept" else one.fate for one in shown], priority=9, left=True),
            Column("rank", [side[0] for side in sides], "its rank in the first findings; 1 is the largest", priority=5),
            Column("sigma", [side[1] for side in sides], "its singular value there", priority=6),
            Column("after", [side[2] for side in sides], "its rank in the second", priority=4),
            Column("sigma after", [side[3] for side in sides], "its singular value there", priority=7),
            Column("overlap", [f"{one.overlap:.3f}" for one in shown], "with the nearest intruder of the other findings", priority=3),
            Column("share", [f"{100 * one.share:.0f}%" for one in shown], "its part in the span of the other findings' intruders", 2),
        ]  # fmt: skip

    def to_dict(self) -> DiffRecord:
        """Return the JSON object (schema ``streamer.diff/1``)."""
        return {
            "schema": SCHEMA, "first": self.first, "second": self.second,
            "totals": cast(_DiffTotals, {"matrices": self.matrices, **{fate: self.count(fate) for fate in FATES}}),
            "notes": list(self.notes), "only_first": list(self.only_first), "only_second": list(self.only_second),
            "intruders": [asdict(one) for one in self.intruders],
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"<FindingsDiff: {fates_counted(self.to_dict()['totals'])}, in {self.matrices} matrices>"


def diff_findings(first: Findings, second: Findings) -> FindingsDiff:
    """Compare two findings on one base.

    Parameters
    ----------
    first, second
        The findings before and after: on an adapter and its mitigated version, or on two checkpoints of a training.

    Raises
    ------
    MismatchError
        If they are on different bases, or one is on files and the other on a model in memory.
    """
    if first.base.get("in_memory") != second.base.get("in_memory"):
        raise MismatchError(
            "findings: expected two on one base, found one on files and one on a model in memory, whose identities cannot be compared; "
            "run detect for both in one place"
        )
    if first.base != second.base:
        names = [str(f.sources.get("base", {}).get("name", "unnamed")) for f in (first, second)]
        raise MismatchError(
            f"findings: expected two on one base, found bases with different content ({names[0]!r} and {names[1]!r}); "
            "run detect for both on the same base"
        )
    both = [m.tensor for m in first if m.tensor in second.by_tensor]
    fates = [fate for name in both for fate in _fates(first.by_tensor[name], second.by_tensor[name])]
    only = [tuple(m.tensor for m in a if m.tensor not in b.by_tensor) for a, b in ((first, second), (second, first))]
    sides: list[DiffSide] = [
        {"adapter": f.sources.get("adapter", {}).get("name"), "options": f.options.as_dict(), "intruders": f.intruders}
        for f in (first, second)
    ]
    return FindingsDiff(tuple(fates), len(both), only[0], only[1], sides[0], sides[1], tuple(_notes(first, second)))


def _fates(first: MatrixFinding, second: MatrixFinding) -> Iterator[IntruderFate]:
    if first.shape != second.shape:
        raise MismatchError(
            f"{first.tensor}: expected one shape in both findings, found {first.shape} and {second.shape}; run detect again"
        )
    found = (first.detection, second.detection)
    a, b = ([Direction(j, d.singular_values[j], d.similarity[j]) for j in d.intruders] for d in found)
    U, V = first.detection.U.double(), second.detection.U.double()
    overlaps = (U.T @ V).square()
    matches = {int(i): int(j) for i, j in torch.nonzero(overlaps > MATCHED)}
    for i, before in enumerate(a):
        j = matches.get(i)
        share = min(1.0, float(overlaps[i].sum()))
        fate: Fate = "kept" if j is not None else "mixed" if share > MATCHED else "gone"
        yield IntruderFate(first.tensor, fate, before, None if j is None else b[j], _nearest(overlaps[i]), share)
    for j, after in enumerate(b):
        share = min(1.0, float(overlaps[:, j].sum()))
        if j not in matches.values() and share <= MATCHED:
            yield IntruderFate(first.tensor, "new", None, after, _nearest(overlaps[:, j]), share)


def _nearest(squares: torch.Tensor) -> float:
    return min(1.0, float(squares.max().sqrt())) if len(squares) else 0.0


def _notes(first: Findings, second: Findings) -> Iterator[str]:
    a, b = first.options, second.options
    if (a.top_k, a.threshold_epsilon) != (b.top_k, b.threshold_epsilon):
        yield (
            f"made with different options (top_k={a.top_k}, epsilon={a.threshold_epsilon:g} and top_k={b.top_k}, "
            f"epsilon={b.threshold_epsilon:g}): that alone can make an intruder of one none of the other"
        )
    for what, findings in (("first", first), ("second", second)):
        if rest := sum(not m.detection.certified for m in findings):
            yield f"{counted(rest, 'matrix')} of the {what} findings {'is' if rest == 1 else 'are'} not certified"

"""Options of an evaluation, which decide its result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from streamer.detection.intruders import Selection
from streamer.errors import UsageError
from streamer.evaluation.suggestion import check_keep
from streamer.evaluation.variants import Variant, make_variants
from streamer.output.mitigation import MitigationMethod

LAMBDAS = (0.9, 0.75, 0.5, 0.25, 0.0)
METHODS: tuple[MitigationMethod, ...] = ("paper", "project", "shrink")


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation: all but `keep` decide its measures.

    Attributes
    ----------
    methods, lambdas
        Every method is evaluated at every λ.
    scale
        ``all`` intruders among the top k, or only the ``first`` (highest-ranked) of each matrix.
    sequences, length
        Sequences of each text, and tokens of a sequence, at most; at least 2 of both.
    keep
        Least share of what the adapter learned that the suggested variant keeps.
    projected
        Whether deltas are projected back onto the adapter's rank, as `mitigate` writes them, and not complete, as `merge` does.
    """

    methods: tuple[MitigationMethod, ...] = METHODS
    lambdas: tuple[float, ...] = LAMBDAS
    scale: Selection = "all"
    sequences: int = 64
    length: int = 512
    keep: float = 0.9
    projected: bool = False

    def __post_init__(self) -> None:
        make_variants(self.methods, self.lambdas, self.scale)
        for name in ("sequences", "length"):
            value = getattr(self, name)
            if type(value) is not int or value < 2:
                raise UsageError(f"{name}: expected a whole number from 2, found {value!r}")
        check_keep(self.keep)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """List the variants: ``base``, ``adapter``, then each method at each λ."""
        return make_variants(self.methods, self.lambdas, self.scale)

    def of_measures(self) -> dict[str, Any]:
        """Return the options that decide the measures, as JSON: all but `keep`, on which the suggestion alone depends."""
        tree = asdict(self)
        del tree["keep"]
        return tree

"""Open and check what a fit reads, and say what it is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from streamer import __version__
from streamer.detection.options import RunOptions
from streamer.evaluation.memory import Pass, plan_passes
from streamer.evaluation.prepare import read_texts, refuse_new_tokens
from streamer.fitting.memory import plan_chunks
from streamer.fitting.options import Division, FitOptions, divide
from streamer.plan.batch import Batch
from streamer.plan.memory import resident_bytes
from streamer.plan.plan import Plan, make_plan
from streamer.streaming.extra import require_transformers
from streamer.streaming.model import StreamingModel
from streamer.streaming.values import Job
from streamer.streaming.variants import BASE, Variant
from streamer.output.mitigation import MitigationOptions
from streamer.units import listed


@dataclass(frozen=True, eq=False)
class PreparedFit:
    """A fit whose inputs are open and checked; nothing is written.

    Attributes
    ----------
    max_memory
        Budget in bytes; None where there is none.
    texts
        ``general`` and ``task``, each in two parts.
    model
        Of the base and one variant, for its sizes.
    """

    plan: Plan
    options: FitOptions
    run: RunOptions
    max_memory: int | None
    texts: Mapping[str, Division]
    model: StreamingModel

    @cached_property
    def chunks(self) -> Mapping[str, list[tuple[int, ...]]]:
        """Divide the sequences that are fitted on, of each text, into those that run together."""
        return {
            name: plan_chunks(text.fitted, self.model.size, self.resident, self.max_memory)
            for name, text in self.texts.items()
        }

    def passes(self, variants: int) -> list[Pass]:
        """Divide the sequences that are held apart, under so many variants, the base among them."""
        held = {name: text.held for name, text in self.texts.items()}
        return plan_passes(held, variants, self.model.size, self.resident, self.max_memory)

    def check_budget(self) -> None:
        """Raise `UsageError` if the budget does not hold one sequence."""
        _ = self.chunks
        self.passes(2)

    @property
    def resident(self) -> int:
        """Estimate the bytes that stay in memory between two steps."""
        return resident_bytes(Batch(self.plan.base, (self.plan,)))

    @cached_property
    def unchanged(self) -> list[str]:
        """List what the adapter changes otherwise than by deltas, which stays as it is."""
        edits = self.plan.edits
        return sorted({*edits.trained, *edits.shifts, *edits.rows})

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Say what it is made of, as JSON; the digest `plan` tells whether two fits are one."""
        options = self.options.as_dict()
        tree = {
            "transformers": require_transformers().__version__,
            "base": self.plan.base_identity,
            "adapter": self.plan.adapter_identity,
            **{name: options[name] for name in ("objective", "grain", "holdout", "seed", "dtype")},
            "texts": {name: _text_facts(text) for name, text in self.texts.items()},
            "unchanged": self.unchanged,
        }
        decided = {**tree, "options": options, "max_memory": self.max_memory}
        return {
            "version": __version__,
            **tree,
            "plan": hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest(),
        }


def _text_facts(text: Division) -> dict[str, Any]:
    """Say what both parts of a text are; the digest is of all of it."""
    return {
        **text.whole.facts(),
        "fitted": {"sequences": len(text.fitted.ids), "tokens": text.fitted.tokens},
        "held": {"sequences": len(text.held.ids), "tokens": text.held.tokens},
    }


def prepare_fit(base: str | Path, adapter: Path, texts: Mapping[str, Path], options: FitOptions, max_memory: int | None,
                run: RunOptions) -> PreparedFit:  # fmt: skip
    """Open and check everything that a fit reads, and hand on the warnings of the inputs.

    Parameters
    ----------
    texts
        Paths of the ``general`` and the ``task`` text.
    """
    require_transformers()
    plan = make_plan(base, adapter, run.io, run.base_is_residual, run.architecture)
    run.monitor.warn(plan.warnings)
    refuse_new_tokens(plan)
    variants = Variant(BASE, None), Variant("fitted", MitigationOptions(1.0, "shrink"))
    model = StreamingModel(Job(plan, variants, None, rounds_products=options.dtype == "bf16"))
    read = read_texts(model, texts, options.sequences, options.length, run.monitor)
    prepared = PreparedFit(plan, options, run, max_memory, divide(read, texts, options), model)
    if prepared.unchanged:
        names = prepared.unchanged
        run.monitor.warn(
            (
                f"{len(names)} tensors that {plan.adapter.path.name} brings besides deltas stay as they are: {listed(names)}",
            )
        )
    return prepared

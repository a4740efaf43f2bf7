"""Map a base's inputs: open and check the files, sweep general text through the base, and keep the leading vectors of each input.

A killed run starts over and gives the same bytes: the map is one file, written at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from streamer.detection.options import Run
from streamer.errors import NumericError, UnsupportedError
from streamer.evaluation.evaluation import TextFacts
from streamer.json_types import Count, OutputPath, Sha256, State, TensorName
from streamer.linalg.moments import MORE, ROWS, leading_vectors
from streamer.measuring import runs
from streamer.measuring.runs import Prepared, Progress, Records, Work
from streamer.measuring.texts import TextSequences, read_text, sample_digest, tokenizer_directory
from streamer.methods.files import MAP, InputMap, MappedInput, load_map
from streamer.options import MappingOptions
from streamer.plan.plan import make_base_plan
from streamer.storage.files import BaseIdentity, limit_freed_memory
from streamer.streaming.model import require_transformers
from streamer.streaming.sweep import (
    LOOKED_UP,
    BaseMatrix,
    BaseWatch,
    Group,
    Site,
    SweepModel,
    same_inputs,
)
from streamer.streaming.values import BASE, Variant, VariantSet
from streamer.units import counted, listed

COPIES = 4
"""Number of float64 matrices of vectors that exist at once while an input's vectors are computed."""

HEADER_BYTES = 200
"""Bytes of an input's entries in the file's header, without the names of its matrices."""


# fmt: off
class MappedText(TextFacts):
    """A text from which a map was made."""
    sample_sha256: Annotated[Sha256, "Digest of a sample of the file (SHA-256, hexadecimal)."]

class MapFacts(TypedDict):
    """A map of a base's inputs, as printed by `streamer map --json`."""
    schema: Literal["streamer.map/1"]
    version: Annotated[str, "Version of streamer that made it."]
    base: Annotated[BaseIdentity, "What identifies the base."]
    texts: Annotated[list[MappedText], "The general texts that it was made on."]
    vectors: Annotated[Count, "Largest number of leading vectors that it keeps for an input."]
    inputs: Annotated[Count, "Number of inputs; matrices with the same input share one."]
    matrices: Annotated[Count, "Matrices with these inputs."]
    lacking: NotRequired[Annotated[list[TensorName], "Matrices of the base without inputs in the map: no token of the text reached them, "
        "they are not a factor of a product, or they run more than once."]]
    sha256: Annotated[Sha256, "Digest of its arrays (SHA-256, hexadecimal)."]
    output: OutputPath
    state: State
# fmt: on


@dataclass(frozen=True, eq=False)
class PreparedMap(Prepared[InputMap]):
    """A map whose base and text are open and checked.

    Attributes
    ----------
    file
        Digest of the text's file; see `sample_digest`.
    """

    options: MappingOptions
    text: TextSequences
    file: str

    kind, noun = MAP, MAP.what
    read = staticmethod(load_map)
    same = "this very map"
    example = "base.map.safetensors"

    @cached_property
    def groups(self) -> list[Group]:
        """Divide the sequences into groups of one length that run together."""
        text = runs.of_few_lengths(self.text)
        parts = runs.parts(text, self.limits.rows, self.model.size.short, one_length=True)
        return [Group(text.take(numbers).padded_ids, 0, stream=BASE) for numbers in parts]

    @property
    def tokens(self) -> int:
        """Return the number of tokens that run."""
        return sum(group.rows for group in self.groups)

    @property
    def solving_bytes(self) -> int:
        """Estimate the memory of computing an input's vectors."""
        return 8 * self.model.size.widest * (ROWS + COPIES * (self.options.vectors + MORE))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Describe the map's inputs and options as JSON; equal `plan` digests mean equal maps."""
        tree = {
            **runs.model_facts(self.model, base={**self.plan.base_identity}),
            "texts": [{**self.text.facts(), "sample_sha256": self.file}],
            "vectors": self.options.vectors,
        }
        return runs.with_digest(tree)

    def sweeps(self, known: InputMap | None = None) -> list[Work]:
        """List the one sweep."""
        return [Work(fitted=sum(map(len, self.text.ids)), riding=0, length=self.text.longest)]

    def written_bytes(self, known: InputMap | None) -> tuple[int, int]:
        """Estimate the bytes of the file, as if no matrices shared inputs, and of the temporary one."""
        matrices = [t for t in self.model.parameters if len(t.shape) > 1]
        vectors = self.options.vectors
        nbytes = sum(
            (t.shape[0] if t.stacked else 1) * (2 * t.shape[-1] * vectors + HEADER_BYTES)
            for t in matrices
        )
        return nbytes, nbytes

    def compute(self, records: Records, output: Path | None) -> InputMap:
        """Sweep the text through the base, and keep the leading vectors of each input."""
        monitor, plan, model = self.run.monitor, self.plan, self.model
        model.directory = None if output is None else output.parent
        if self.max_memory is not None:
            limit_freed_memory()
        watch, collector, progress = BaseWatch(plan), _Collector(self), Progress(self.run, "map")
        cost, steps = (
            runs.sweep_cost(model.size, self.tokens, len(self.groups)),
            len(model.layers) + 1,
        )
        progress.expect(cost, steps)
        model.limit(self.limits.room, self.limits.spools)
        model.run(
            self.groups,
            monitor.checkpoint,
            collector,
            watch,
            lambda name: progress.layer(name, cost // steps),
        )
        monitor.checkpoint()
        plan.check_unchanged()
        progress.finish()
        tokens, vectors = self.tokens, self.options.vectors
        widest = max(
            (entry.size for entry in collector.matrices_of if entry.vectors is not None), default=0
        )
        if tokens < min(vectors, widest):
            what = f"{counted(tokens, 'token')}, fewer than the {vectors} vectors that are kept of each input; give more text"
            monitor.warn((f"{self.text.name}: has {what}",))
        elif tokens < widest:
            what = f"{tokens} tokens, fewer than the {widest} inputs of the widest matrix: of what it does not show, the map keeps the mean"
            monitor.warn(
                (f"{self.text.name}: has {what}; with more text, adapters may forget less",)
            )
        entries = collector.named_entries()
        if not entries:
            raise UnsupportedError(
                f"{plan.base.path}: no matrix multiplies inputs that can be collected, so there is nothing to map"
            )
        every = {name for tensor in model.parameters for name in watch.names(tensor)}
        lacking = sorted(
            every - {name.removesuffix(LOOKED_UP) for name in collector.mapped - collector.repeated}
        )
        if lacking:
            monitor.warn(
                (
                    f"the map lacks the inputs of {counted(len(lacking), 'matrix')}, {listed(map(repr, lacking))}: no token of the text "
                    "reached them, or their inputs cannot be collected; an adapter's deltas there will stay unchanged",
                )
            )
        return InputMap(entries, {**self.facts, "lacking": lacking}, output)


def prepare_map(
    base: str | Path, text: Path, options: MappingOptions, max_memory: int | None, run: Run
) -> PreparedMap:
    """Open and check a base and a general text, and pass on their warnings."""
    require_transformers()
    plan = make_base_plan(base, run.io, run.architecture)
    run.monitor.warn(plan.base.warnings)
    rounds, device = options.dtype == "bf16", run.model_device
    model = SweepModel(VariantSet(plan, (Variant(BASE, None),), None, False, rounds, device))
    read = read_text(
        text,
        tokenizer_directory(plan),
        sequences=options.sequences,
        length=options.length,
        vocabulary=model.vocabulary,
        positions=model.positions,
    )
    return PreparedMap(plan, run, max_memory, model, options, read, sample_digest(text))


class _Collector:
    """Makes an entry for the inputs of each site; see `SweepModel.run`.

    Attributes
    ----------
    matrices_of
        The entries, still without names, each with the matrices that receive its inputs.
    mapped, repeated
        Names of the matrices in entries, and of those that run more than once.
    """

    def __init__(self, prepared: PreparedMap) -> None:
        self.prepared, self.matrices_of = prepared, dict[MappedInput, list[BaseMatrix]]()
        self.mapped, self.repeated = set[str](), set[str]()
        self._last_entry: MappedInput | None = None
        self._last_inputs: list[Tensor] = []

    def __call__(self, site: Site, inputs: Mapping[Group, Tensor]) -> None:
        """Map a site's inputs; matrices that follow each other and share their inputs, such as q, k and v, share an entry."""
        tensors, names = (
            [x for x in inputs.values() if len(x)],
            {matrix.tensor for matrix in site.matrices},
        )
        if names & self.mapped:
            self.repeated |= names
            entry = None
        elif site.size is None and same_inputs(self._last_inputs, tensors):
            entry = self._last_entry
        else:
            entry = self._entry(site, tensors) if tensors else None
        self._last_entry, self._last_inputs = entry, [] if entry is None else tensors
        if entry is not None:
            self.matrices_of.setdefault(entry, []).extend(site.matrices)
            self.mapped |= names

    def named_entries(self) -> tuple[MappedInput, ...]:
        """Return the entries with the names of their matrices that run once; entries without any are left out."""
        names_of = {
            entry: dict.fromkeys(
                name for m in matrices if m.tensor not in self.repeated for name in m.names
            )
            for entry, matrices in self.matrices_of.items()
        }
        return tuple(
            replace(entry, names=tuple(names)) for entry, names in names_of.items() if names
        )

    def _entry(self, site: Site, inputs: Sequence[Tensor]) -> MappedInput | None:
        """Keep the leading part of the moments of a site's inputs, without names; None if all inputs are zero."""
        tokens = self.prepared.tokens
        if site.size is not None:
            counts = torch.bincount(torch.cat([*inputs]), minlength=site.size).cpu()
            return MappedInput(
                (), tokens, site.size, int(counts.sum()) / tokens, counts.double() / tokens, None
            )
        squares = sum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in inputs)
        if not math.isfinite(squares):
            name = site.matrices[0].tensor
            raise NumericError(
                f"{self.prepared.plan.base.path}: the inputs of {name!r} are NaN or Inf on the text"
            )
        if not squares:
            return None
        values, vectors = (
            t.cpu() for t in leading_vectors(inputs, tokens, self.prepared.options.vectors)
        )
        rounded = vectors.T.to(torch.bfloat16).contiguous()
        return MappedInput(
            (), tokens, inputs[0].shape[1], squares / tokens, values.contiguous(), rounded
        )


def map_record(input_map: InputMap, output: str, state: Any) -> MapFacts:
    """Describe a map as JSON."""
    facts, names = input_map.facts, {name for entry in input_map.inputs for name in entry.names}
    record: MapFacts = {
        "schema": "streamer.map/1",
        "version": facts["version"],
        "base": facts["base"],
        "texts": facts["texts"],
        "vectors": facts["vectors"],
        "inputs": len(input_map.inputs),
        "matrices": len(names),
        "sha256": input_map.digest,
        "output": output,
        "state": state,
    }
    if "lacking" in facts:
        record["lacking"] = facts["lacking"]
    return record

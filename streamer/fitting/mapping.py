"""Map a base's inputs: open and check the files, sweep general text through the base, and keep the leading vectors of each input.

A killed run starts over and gives the same bytes: the map is one file, written at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from streamer.errors import NumericError, UnsupportedError
from streamer.json_types import Count, JsonObject, OutputPath, Sha256, State, TensorName
from streamer.linalg.moments import MORE, ROWS, leading_vectors
from streamer.measuring.batches import Work, groups_to_fit
from streamer.measuring.facts import model_facts, with_digest
from streamer.measuring.losses import SweepProgress, cost_of
from streamer.measuring.prepared import Prepared, Records, model_of
from streamer.measuring.sequences import TextFacts, TextSequences
from streamer.measuring.texts import read_text, sample_digest
from streamer.measuring.tokenizer import tokenizer_directory
from streamer.methods.files import MAP, InputMap, MappedInput, load_map
from streamer.options import MappingOptions
from streamer.plan.plan import make_base_plan
from streamer.run import Run
from streamer.storage.files import BaseIdentity, limit_freed_memory
from streamer.streaming.groups import Group
from streamer.streaming.sites import LOOKED_UP, BaseMatrix, BaseWatch, Site, same_inputs
from streamer.streaming.skeleton import require_transformers
from streamer.streaming.variants import BASE, BASE_ROW, Variant
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

    kind = MAP
    noun = MAP.what
    read = staticmethod(load_map)
    same = "this very map"
    example = "base.map.safetensors"

    @cached_property
    def groups(self) -> list[Group]:
        """Divide the sequences into groups of one length that run together."""
        return groups_to_fit(self.text, self.limits.rows, self.model.size, BASE_ROW, BASE)

    @property
    def tokens(self) -> int:
        """Return the number of tokens that run."""
        return sum(group.rows for group in self.groups)

    @property
    def solving_bytes(self) -> int:
        """Estimate the memory of computing an input's vectors."""
        return 8 * self.model.size.widest * (ROWS + COPIES * (self.options.vectors + MORE))

    @cached_property
    def facts(self) -> JsonObject:
        """Describe the map's inputs and options as JSON; equal `plan` digests mean equal maps."""
        tree = {
            **model_facts(self.model, base=self.plan.base_identity),
            "texts": [{**self.text.facts(), "sample_sha256": self.file}],
            "vectors": self.options.vectors,
        }
        return with_digest(tree)

    def sweeps(self, known: InputMap | None = None) -> list[Work]:
        """List the one sweep."""
        return [Work(0, self.text.longest, self.text.rows)]

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
        monitor = self.run.monitor
        model = self.model
        model.directory = None if output is None else output.parent
        if self.max_memory is not None:
            limit_freed_memory()
        watch = BaseWatch(self.plan)
        collector = _Collector(self)
        progress = SweepProgress(monitor, "map")
        cost = cost_of(model.size, self.groups)
        steps = len(model.layers) + 1
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
        self.plan.check_unchanged()
        progress.finish()
        monitor.warn(self._few_tokens(collector.widest))
        entries = collector.named_entries()
        if not entries:
            raise UnsupportedError(
                f"{self.plan.base.path}: no matrix multiplies inputs that can be collected, so there is nothing to map"
            )
        every = {name for tensor in model.parameters for name in watch.names(tensor)}
        mapped = {name.removesuffix(LOOKED_UP) for name in collector.mapped - collector.repeated}
        lacking = sorted(every - mapped)
        if lacking:
            which = f"{counted(len(lacking), 'matrix')}, {listed(map(repr, lacking))}"
            why = "no token of the text reached them, or their inputs cannot be collected"
            stays = "an adapter's deltas there will stay unchanged"
            monitor.warn([f"the map lacks the inputs of {which}: {why}; {stays}"])
        return InputMap(entries, {**self.facts, "lacking": lacking}, output)

    def _few_tokens(self, widest: int) -> Iterator[str]:
        """Warn of a text with fewer tokens than vectors are kept, or than the widest matrix has inputs."""
        vectors = self.options.vectors
        if self.tokens < min(vectors, widest):
            has = counted(self.tokens, "token")
            yield f"{self.text.name}: has {has}, fewer than the {vectors} vectors that are kept of each input; give more text"
        elif self.tokens < widest:
            yield (
                f"{self.text.name}: has {self.tokens} tokens, fewer than the {widest} inputs of the widest matrix: of what it does not "
                "show, the map keeps the mean; with more text, adapters may forget less"
            )


def prepare_map(
    base: str | Path, text: Path, options: MappingOptions, max_memory: int | None, run: Run
) -> PreparedMap:
    """Open and check a base and a general text, and pass on their warnings."""
    require_transformers()
    plan = make_base_plan(base, run.io, run.architecture)
    run.monitor.warn(plan.base.warnings)
    model = model_of(plan, [Variant(BASE, None)], options.dtype, run)
    read = read_text(
        text,
        tokenizer_directory(plan),
        sequences=options.sequences,
        length=options.length,
        vocabulary=model.vocabulary,
        positions=model.positions,
    )
    return PreparedMap(run, max_memory, model, options, read, sample_digest(text))


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
        self.prepared = prepared
        self.matrices_of: dict[MappedInput, list[BaseMatrix]] = {}
        self.mapped: set[str] = set()
        self.repeated: set[str] = set()
        self._last_entry: MappedInput | None = None
        self._last_inputs: list[Tensor] = []

    @property
    def widest(self) -> int:
        """Return the size of the largest input that has vectors."""
        sizes = (entry.size for entry in self.matrices_of if entry.vectors is not None)
        return max(sizes, default=0)

    def __call__(self, site: Site, inputs: Mapping[Group, Tensor]) -> None:
        """Map a site's inputs; matrices that follow each other and share their inputs, such as q, k and v, share an entry."""
        tensors = [x for x in inputs.values() if len(x)]
        names = {matrix.tensor for matrix in site.matrices}
        entry = None
        if names & self.mapped:
            self.repeated |= names
        elif site.size is None and same_inputs(self._last_inputs, tensors):
            entry = self._last_entry
        elif tensors:
            entry = self._entry(site, tensors)
        self._last_entry = entry
        self._last_inputs = [] if entry is None else tensors
        if entry is not None:
            self.matrices_of.setdefault(entry, []).extend(site.matrices)
            self.mapped |= names

    def named_entries(self) -> tuple[MappedInput, ...]:
        """Return the entries with the names of their matrices that run once; entries without any are left out."""
        entries = []
        for entry, matrices in self.matrices_of.items():
            once = [matrix for matrix in matrices if matrix.tensor not in self.repeated]
            if names := dict.fromkeys(name for matrix in once for name in matrix.names):
                entries.append(replace(entry, names=tuple(names)))
        return tuple(entries)

    def _entry(self, site: Site, inputs: Sequence[Tensor]) -> MappedInput | None:
        """Keep the leading part of the moments of a site's inputs, without names; None if all inputs are zero."""
        tokens = self.prepared.tokens
        if site.size is not None:
            counts = torch.bincount(torch.cat([*inputs]), minlength=site.size).cpu()
            mean = int(counts.sum()) / tokens
            return MappedInput((), tokens, site.size, mean, counts.double() / tokens, None)
        squares = sum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in inputs)
        if not math.isfinite(squares):
            first, *_ = site.matrices
            raise NumericError(
                f"{self.prepared.plan.base.path}: the inputs of {first.tensor!r} are NaN or Inf on the text"
            )
        if not squares:
            return None
        values, vectors = leading_vectors(inputs, tokens, self.prepared.options.vectors)
        rounded = vectors.cpu().T.to(torch.bfloat16).contiguous()
        size = len(vectors)
        return MappedInput((), tokens, size, squares / tokens, values.cpu().contiguous(), rounded)


def map_record(input_map: InputMap, output: str, state: Any) -> MapFacts:
    """Describe a map as JSON."""
    facts = input_map.facts
    names = {name for entry in input_map.inputs for name in entry.names}
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

"""Map a base's inputs: open and check the files, run general text through the base, and keep the leading vectors of each input.

A killed run starts over and gives the same bytes: the map is one file, written at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from streamer.detection.options import Run
from streamer.errors import UnsupportedError, UsageError
from streamer.evaluation.losses import ProductDtype, check_dtype
from streamer.fitting.fit import layers_on_workers, of_few_lengths, shared_memory
from streamer.fitting.prepare import INPUT_COPIES, ROWS, collecting_bytes, states_bytes
from streamer.json_types import Count, OutputPath, Sha256, TensorName
from streamer.json_types import State as Done
from streamer.linalg.moments import MORE, ROUNDS, Moments, OneHotMoments, leading_vectors
from streamer.measuring.passes import RunProgress, pass_cost
from streamer.measuring.result_file import Records, ResultFile, State, computing, model_facts, stands, with_digest
from streamer.measuring.sequences import TextSequences, tokenizer_directory
from streamer.measuring.task import parts, rows_within
from streamer.measuring.texts import read_text, sample_digest
from streamer.methods.maps import MAP, VECTORS, InputMap, MappedInput, load_map
from streamer.plan.batch import AdapterBatch, MemoryEstimate, resident_bytes
from streamer.plan.plan import Plan, make_base_plan
from streamer.storage.files import BaseIdentity, limit_freed_memory
from streamer.streaming.inputs import BaseInputModel, BaseMatrix
from streamer.streaming.model import StreamingModel, require_transformers
from streamer.streaming.run_time import GENERAL_AS, Group
from streamer.streaming.spool import ROWS as ROWS_OF_INPUTS
from streamer.streaming.values import BASE, Variant, VariantSet
from streamer.units import counted, listed
from streamer.workers import kept

COPIES = 4
"""Number of float64 matrices of vectors that exist at once while an input's vectors are computed."""

HEADER_BYTES = 200
"""Bytes of an input's entries in the file's header, without the names of its matrices."""


# fmt: off
class MappedText(TypedDict):
    """A text from which a map was made."""
    name: Annotated[str, "Name of its file."]
    sequences: Annotated[Count, "Sequences taken from it."]
    tokens: Annotated[Count, "Their tokens, without the first token of each."]
    length: Annotated[Count, "Tokens of the longest sequence."]
    sha256: Annotated[Sha256, "Digest of the sequences (SHA-256, hexadecimal)."]
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
        "they are not a factor of a product, or they run in several layers."]]
    sha256: Annotated[Sha256, "Digest of its arrays (SHA-256, hexadecimal)."]
    output: OutputPath
    state: Done
# fmt: on


@dataclass(frozen=True)
class MapOptions:
    """Options of a map, all of which affect it: keywords of `api.map_inputs`, which explains them."""

    vectors: int = VECTORS
    sequences: int = 32
    length: int = 512
    dtype: ProductDtype = "float32"

    def __post_init__(self) -> None:
        for name, least in (("vectors", 1), ("sequences", 2), ("length", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UsageError(f"{name}: expected a whole number from {least}, found {value!r}")
        check_dtype(self.dtype)


@dataclass(frozen=True, eq=False)
class PreparedMap:
    """A map whose base and text are open and checked; nothing is written.

    Attributes
    ----------
    max_memory
        Budget in bytes; None for no budget.
    file
        Digest of the text's file; see `sample_digest`.
    model
        Model that supplies sizes.
    """

    plan: Plan
    options: MapOptions
    run: Run
    max_memory: int | None
    text: TextSequences
    file: str
    model: StreamingModel

    @cached_property
    def groups(self) -> list[TextSequences]:
        """Divide the sequences into groups that run together."""
        text = of_few_lengths(self.text)
        most = rows_within(self.max_memory, text.longest, ROWS, self._bytes,
                           f"the inputs of a sequence of {text.longest} tokens")  # fmt: skip
        return [text.take(rows) for rows in parts(text, range(len(text.ids)), most, self.model.size.short, True)]

    @property
    def tokens(self) -> int:
        """Return the number of tokens that run."""
        return sum(len(ids) for group in self.groups for ids in group.ids)

    def cost(self, group: TextSequences) -> int:
        """Count the multiplications of a group, plus its part of computing each input's vectors."""
        each = sum(min(self.options.vectors + MORE, n) * n for n in self.widths)
        return pass_cost(self.model.size, group, 1) + 2 * (ROUNDS + 1) * each * len(group.ids) * group.longest

    @cached_property
    def widths(self) -> list[int]:
        """List the number of inputs of each matrix, even if several share them, taken from the last stored dimension."""
        own = [t for _, _, own in self.model.modules for t in own.values() if len(t.shape) > 1]
        return [t.shape[-1] for t in own for _ in range(t.shape[0] if t.stacked else 1)]

    @property
    def peak_bytes(self) -> int:
        """Estimate the peak memory of the largest step."""
        return self._bytes(max(sum(map(len, group.ids)) for group in self.groups))

    @property
    def resident(self) -> int:
        """Estimate the bytes in memory between two steps."""
        return resident_bytes(AdapterBatch(self.plan.base, (self.plan,)))

    def shared(self) -> PreparedMap:
        """Divide the allowed memory among this process, which also needs a share, and its workers; see `Workers.budget`."""
        longest = self.text.longest
        need = MemoryEstimate(f"the inputs of a sequence of {longest} tokens", (), self._bytes(longest))
        tokens = sum(map(len, self.text.ids))
        return replace(self, max_memory=shared_memory(self.run, self.max_memory, self.model.size, tokens, need))

    def _bytes(self, rows: int) -> int:
        size, text = self.model.size, self.text
        vectors = self.options.vectors + MORE
        decomposing = size.widest * (INPUT_COPIES * 4 * ROWS_OF_INPUTS + COPIES * 8 * vectors)
        states = states_bytes(size, self.resident, sum(map(len, text.ids)))
        return states + max(collecting_bytes(size, rows, text.longest), decomposing)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Describe the map's inputs and options as JSON; equal `plan` digests mean equal maps."""
        tree = {
            **model_facts(self.model, base={**self.plan.base_identity}),
            "texts": [{**self.text.facts(), "sample_sha256": self.file}],
            "vectors": self.options.vectors,
        }
        return with_digest(tree, options=asdict(self.options), max_memory=self.max_memory)

    def result_file(self, output: Path) -> ResultFile:
        """Describe the map's output file."""
        return ResultFile(output, MAP.what, "this very map", "base.map.safetensors", self.plan, self.run, self.facts,
                          lambda path: stands(path, MAP, self.facts, load_map))  # fmt: skip

    def inspect(self, output: Path) -> State:
        """Check, without writing, whether the map can be written to a file, and whether the file exists or was begun."""
        file = self.result_file(output)
        file.check_path()
        _ = self.groups
        return file.state()


def prepare_map(base: str | Path, text: Path, options: MapOptions, max_memory: int | None, run: Run) -> PreparedMap:
    """Open and check a base and a general text, and pass on their warnings."""
    require_transformers()
    plan = make_base_plan(base, run.io, run.architecture)
    run.monitor.warn(plan.base.warnings)
    if max_memory is not None:
        limit_freed_memory()
    job = VariantSet(
        plan, (Variant(BASE, None),), None, rounds_products=options.dtype == "bf16", device=run.model_device
    )
    model = StreamingModel(job)
    read = read_text(text, tokenizer_directory(plan), sequences=options.sequences, length=options.length,
                     vocabulary=model.vocabulary, positions=model.positions).right()  # fmt: skip
    return PreparedMap(plan, options, run, max_memory, read, sample_digest(text), model).shared()


def make_map(prepared: PreparedMap, output: Path | None) -> InputMap:
    """Make a map in memory, or in a file if an output is given."""
    if output is None:
        return _made(prepared, Records(), None)
    file = prepared.result_file(output)
    if prepared.inspect(output) == "done":
        file.left()
        return load_map(output)
    with file.written() as records:
        made = _made(prepared, records, output.parent)
        made.save(output, overwrite=True)  # `inspect` has permitted it for any existing file
    return load_map(output)


def _made(prepared: PreparedMap, records: Records, directory: Path | None) -> InputMap:
    monitor, plan = prepared.run.monitor, prepared.plan
    progress = RunProgress(monitor, prepared.model.size, "map")
    costs = [prepared.cost(group) for group in prepared.groups]
    progress.expect(costs)
    found: list[tuple[Sequence[BaseMatrix], MappedInput]] = []

    def complete(matrices: list[BaseMatrix], moments: Mapping[int, Moments]) -> None:
        monitor.checkpoint()
        names = tuple(dict.fromkeys(name for matrix in matrices for name in matrix.names))
        found.append((matrices, _mapped(names, prepared.tokens, moments[GENERAL_AS], prepared.options.vectors)))

    with kept(prepared.run.workers), computing(records.threads, monitor):
        job = prepared.model.job
        model = BaseInputModel(plan, rounds_products=job.rounds_products, directory=directory, device=job.device,
                               elsewhere=layers_on_workers(job, prepared.run, records.threads))  # fmt: skip
        hooks = progress.readings(costs, [1] * len(costs))
        groups = [Group(group, GENERAL_AS, hook) for group, hook in zip(prepared.groups, hooks, strict=True)]
        model.collect(groups, complete)
    plan.check_unchanged()
    for cost in costs:
        progress.advance(cost)
    progress.finish()
    monitor.warn(_shortness(prepared, max((one.size for _, one in found if one.vectors is not None), default=0)))
    own = [one for matrices, one in found if not model.repeated & {matrix.tensor for matrix in matrices}]
    if not own:
        raise UnsupportedError(
            f"{plan.base.path}: no matrix multiplies inputs that can be collected, so there is nothing to map"
        )
    if lacking := model.lacking():
        monitor.warn((f"the map lacks the inputs of {counted(len(lacking), 'matrix')}, {listed(map(repr, lacking))}: no token of the text "
                      "reached them, or their inputs cannot be collected; an adapter's deltas there will stay unchanged",))  # fmt: skip
    return InputMap(tuple(own), {**prepared.facts, "lacking": lacking})


def _shortness(prepared: PreparedMap, widest: int) -> list[str]:
    """Warn of a text that is short for the inputs of the widest matrix, or for the kept vectors."""
    tokens, vectors = prepared.tokens, prepared.options.vectors
    if tokens < min(vectors, widest):
        return [f"{prepared.text.name}: has {counted(tokens, 'token')}, fewer than the {vectors} vectors that are kept of each input; give "
                "more text"]  # fmt: skip
    if tokens < widest:
        return [f"{prepared.text.name}: has {tokens} tokens, fewer than the {widest} inputs of the widest matrix: of what it does not "
                "show, the map keeps the mean; with more text, adapters may forget less"]  # fmt: skip
    return []


def _mapped(names: tuple[str, ...], tokens: int, moments: Moments, count: int) -> MappedInput:
    """Keep the leading part of an input's moments."""
    if isinstance(moments, OneHotMoments):
        return MappedInput(names, tokens, moments.size, moments.trace, moments.diagonal.cpu(), None)
    values, vectors = (found.cpu() for found in leading_vectors(moments, count))
    rounded: Tensor = vectors.T.to(torch.bfloat16).contiguous()
    return MappedInput(names, tokens, moments.size, moments.trace, values.contiguous(), rounded)


def map_record(made: InputMap, output: str, state: Any) -> MapFacts:
    """Describe a map as JSON."""
    record: MapFacts = {
        "schema": "streamer.map/1", "version": made.facts["version"], "base": made.facts["base"], "texts": made.facts["texts"],
        "vectors": made.facts["vectors"], "inputs": len(made.inputs), "matrices": len({n for one in made.inputs for n in one.names}),
        "sha256": made.digest, "output": output, "state": state,
    }  # fmt: skip
    if "lacking" in made.facts:
        record["lacking"] = made.facts["lacking"]
    return record

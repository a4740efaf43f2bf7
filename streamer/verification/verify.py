"""Verify an output's files and, if inputs are given, a sample of its matrices."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

from streamer.errors import FormatError, MissingInputError, UsageError, VerificationError
from streamer.events import Event, Monitor
from streamer.verification.directory import check_files, check_tensors
from streamer.verification.record import check_digest, check_record, check_stamps, read_record, shards
from streamer.verification.result import RECORD_NAME, Checked, NotRecomputed, Outcome, Verification

Check = Callable[[dict[str, Any]], Checked]


def verify(
    output: str | Path,
    base: str | Path | None,
    adapter: str | Path | None,
    sample: int | Literal["all"],
    max_memory: int | None,
    monitor: Monitor,
    coefficients: str | Path | None = None,
    inputs_map: str | Path | None = None,
) -> Verification:
    """Verify an output; `streamer.verify_output` explains the parameters."""
    if (base is None) != (adapter is None):
        raise UsageError("verify: expected BASE and ADAPTER, found one of them; give both, or neither")
    if sample != "all" and (isinstance(sample, bool) or not isinstance(sample, int) or sample < 1):
        raise UsageError(f"sample: expected a count from 1 or 'all', found {sample!r}")
    if base is None and sample == "all":
        raise UsageError("sample: 'all' recomputes matrices from BASE and ADAPTER; give both, or leave it out")
    path = Path(output)
    inputs = None if base is None or adapter is None else (Path(base), Path(adapter))
    if not path.exists():
        raise MissingInputError(f"{path}: expected an output of streamer, found nothing; check the path", path)
    with ExitStack() as opened:
        verifying = _verify_directory if path.is_dir() else _verify_findings
        outcome = verifying(path, inputs, _Sample(sample, max_memory, monitor, coefficients, inputs_map), opened)
    result = outcome.result(None if inputs is None else {"base": str(base), "adapter": str(adapter)})
    if outcome.not_recomputed and not outcome.recomputed and not outcome.differences:
        why = outcome.not_recomputed[0]["reason"]
        monitor.warn([f"{path}: none of its matrices could be recomputed: {why}"])
    if outcome.differences:
        first, *more = (difference["message"] for difference in outcome.differences)
        raise VerificationError(f"{first}, and {len(more)} more" if more else first, result)
    return result


class _Sample:
    """Recompute matrices until the requested number is checked; compare all other tensors if all matrices were requested."""

    def __init__(
        self, size: int | Literal["all"], max_memory: int | None, monitor: Monitor, coefficients: str | Path | None,
        inputs_map: str | Path | None,
    ) -> None:  # fmt: skip
        self._size, self._max_memory, self.monitor = size, max_memory, monitor
        self.files = {"regmean": ("coefficients", coefficients), "nullspace": ("map", inputs_map)}
        """For each method that needs a file, the option that names it and the file."""

    def file_of(self, method: str) -> Path | None:
        """Return the file with a method's values, if given; refuse a file for another method."""
        for needs, (option, path) in self.files.items():
            if path is not None and needs != method:
                raise UsageError(f"{option}: is not needed for an output of method {method!r}; leave it out")
        path = self.files.get(method, ("", None))[1]
        return None if path is None else Path(path)

    def recompute(
        self, outcome: Outcome, rows: Sequence[dict[str, Any]], seed: str, needs: Callable[[str], int], check: Check,
        others: Sequence[tuple[str, Callable[[], None]]] = (),
    ) -> None:  # fmt: skip
        """Recompute a sample of rows that covers all kinds of matrices, drawn by digests of their names.

        Parameters
        ----------
        seed
            Makes the sample of an output repeatable.
        needs
            Returns the bytes that recomputing a tensor of the base needs.
        check
            Recomputes one row and notes differences.
        others
            All other tensors, each with a comparison that notes differences.
        """
        count = len(rows) if self._size == "all" else min(self._size, len(rows))
        outcome.matrices, outcome.tensors = len(rows), len(others)
        compared = others if self._size == "all" else ()
        total = count + len(compared)
        for row in _spread(rows, seed):
            done = len(outcome.recomputed)
            if done >= count:
                break
            self._step(row["tensor"], done, total)
            try:
                if self._max_memory is not None and (need := needs(row["tensor"])) > self._max_memory:
                    raise NotRecomputed(
                        f"it needs {need >> 20}M of memory, over the {self._max_memory >> 20}M of max_memory"
                    )
                error, decisions = check(row)
                outcome.recomputed.append({"tensor": row["tensor"], "error": min(error, 1e300), "decisions": decisions})
            except NotRecomputed as e:
                outcome.not_recomputed.append({"tensor": row["tensor"], "reason": str(e)})
        for done, (name, compare) in enumerate(compared, count):
            self._step(name, done, total)
            try:
                compare()
                outcome.compared += 1
            except NotRecomputed as e:
                outcome.not_compared.append({"tensor": name, "reason": str(e)})
        self._step("", total, total)

    def _step(self, name: str, done: int, total: int) -> None:
        self.monitor.checkpoint()
        self.monitor.emit(Event("recompute", name, done, total, done, total))


def _spread(rows: Sequence[dict[str, Any]], seed: str) -> Iterator[dict[str, Any]]:
    """Yield one matrix of each kind, then another of each. A kind is a name without its numbers: ``layers.N.mlp.up_proj.weight``."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: hashlib.sha256(f"{seed} {row['tensor']}".encode()).digest()):
        kinds.setdefault(re.sub(r"\d+", "N", row["tensor"]), []).append(row)
    while kinds:
        yield from [left.pop(0) for left in kinds.values()]
        kinds = {kind: left for kind, left in kinds.items() if left}


def _verify_directory(path: Path, inputs: tuple[Path, Path] | None, sample: _Sample, opened: ExitStack) -> Outcome:
    record = read_record(path)
    if isinstance(record, str):
        outcome = Outcome(path, "model")
        outcome.misrecorded("the record of an output", record)
        return outcome
    outcome = Outcome(path, "model" if record["command"] == "merge" else "adapter", matrices=len(record["matrices"]))
    check_record(record, outcome)
    if not outcome.differences:
        check_digest(record, outcome)
    if outcome.differences:  # a damaged record is no basis for comparison
        return outcome
    base = adapter = None
    if inputs is not None:
        base, adapter = _open_inputs(inputs, record["base"], record["adapter"], path, opened)
    check_files(record, outcome, sample.monitor)
    check_stamps(record, outcome)
    check_tensors(record, outcome, base)
    if base is None or adapter is None or outcome.differences:
        return outcome
    from streamer.verification.configs import ModelConfigCheck, check_adapter_config
    from streamer.verification.fitted import read_factors
    from streamer.verification.formulas import AdapterFiles
    from streamer.verification.inventory import check_carried, check_rows
    from streamer.verification.matrices import Recomputation
    from streamer.verification.null_space import read_map
    from streamer.verification.others import AdapterTensors, MergedTensors
    from streamer.verification.side_files import check_side_files
    from streamer.verification.tensors import TensorFiles

    assert inputs is not None
    check_rows(record["matrices"], adapter, base, outcome.output / RECORD_NAME, outcome)
    carried = check_carried(record, adapter, base, outcome)
    check_side_files(record, inputs[0], adapter, outcome)
    others: AdapterTensors | MergedTensors
    files: TensorFiles | AdapterFiles
    if outcome.kind == "adapter":
        files = opened.enter_context(AdapterFiles(path))
        check_adapter_config(record, adapter, files, outcome)
        others = AdapterTensors(outcome, record, base, adapter, files)
    else:
        files = opened.enter_context(TensorFiles([path / name for name in shards(record)], "pt"))
        source = adapter.directory if adapter.is_model else inputs[0]
        ModelConfigCheck(outcome, record, source, adapter, base, files, carried).check()
        others = MergedTensors(outcome, record, base, adapter, files, carried)
    if outcome.differences:
        return outcome
    fitted = mapped = None
    if (given := sample.file_of(record["method"])) is not None:
        if record["method"] == "regmean":
            fitted = read_factors(given, record["coefficients"]["sha256"])
        else:
            mapped = read_map(given, record["map"]["sha256"])
    recomputation = Recomputation(outcome, base, adapter, record, carried, fitted, mapped)
    check = partial(recomputation.check, files=files)
    sample.recompute(outcome, record["matrices"], record["plan"], _needs(base), check, [*others.comparisons()])
    return outcome


def _verify_findings(path: Path, inputs: tuple[Path, Path] | None, sample: _Sample, opened: ExitStack) -> Outcome:
    from streamer.verification.findings import FindingsCheck, read_findings
    from streamer.verification.inventory import check_rows
    from streamer.verification.tensors import TensorFiles

    outcome = Outcome(path, "findings")
    if path.suffix != ".safetensors":
        raise FormatError(
            f"{path}: expected an output's directory or findings, a .safetensors file, found another; name what streamer wrote"
        )
    tree = read_findings(outcome, inputs is not None, sample.monitor)
    if tree is None:
        return outcome
    outcome.matrices = len(tree["matrices"])
    if inputs is not None:
        base, adapter = _open_inputs(inputs, tree["base"], tree["adapter"], path, opened)
        file = opened.enter_context(TensorFiles([path], "pt"))
        check_rows(tree["matrices"], adapter, base, path, outcome)
        findings = FindingsCheck(outcome, tree, base, adapter, file)
        sample.recompute(outcome, tree["matrices"], "findings", _needs(base), findings.check)
    return outcome


def _open_inputs(inputs: tuple[Path, Path], base: Any, adapter: Any, output: Path, opened: ExitStack) -> Any:
    """Open base and adapter after checking that the output was made from them."""
    from safetensors import SafetensorError

    from streamer.verification.formulas import AdapterFiles
    from streamer.verification.inputs import check_adapter, model_files
    from streamer.verification.tensors import TensorFiles

    check_adapter(inputs[1], adapter, output)
    paths = model_files(inputs[0], base, output)
    try:
        files = opened.enter_context(TensorFiles(paths, "pt"))
        return files, opened.enter_context(AdapterFiles(inputs[1], inputs[0], base.get("architecture")))
    except SafetensorError as e:
        raise FormatError(
            f"{inputs[0]}: expected safetensors files, found one that the library refuses ({e}); get it again"
        ) from e


def _needs(base: Any) -> Callable[[str], int]:
    """Estimate the memory of recomputing a matrix: four float64 copies if LAPACK decomposes it, else one, plus the process itself."""

    def needs(tensor: str) -> int:
        if tensor not in base:
            return 0
        shape: tuple[int, ...] = base.stored(tensor).shape
        side = min(shape[0], prod(shape[1:]))
        return (8 * prod(shape) * (4 if side <= 2048 else 1)) + (400 << 20)

    return needs

"""Keep the sums of passes in memory or in a journal, and tell whether an evaluation stands or was begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from streamer import __version__
from streamer.detection.findings_file import journal_of
from streamer.detection.memory import detection_estimates
from streamer.detection.run import naming_inputs
from streamer.errors import OutputError, OutputExistsError, StreamerError
from streamer.evaluation.evaluation import load_evaluation
from streamer.evaluation.prepare import Prepared
from streamer.evaluation.statistics import MEASURES, SequenceSums
from streamer.plan.memory import check_budget
from streamer.storage.journal import Journal, may_resume
from streamer.storage.output_checks import check_name, check_output_path, is_placeholder, refuse_symlink


def inspect(prepared: Prepared, output: Path) -> Literal["new", "resume", "done"]:
    """Check, read-only, whether an evaluation can be written to a file, and whether it stands there or was begun."""
    plan, run = prepared.plan, prepared.run
    refuse_symlink(output)
    if output.is_dir():
        raise OutputError(f"{output}: is a directory; name a file in it, such as {output / 'evaluation.json'}")
    check_output_path(output.parent, (), output)
    check_name(output, journal_of(output).name + ".0123456789abcdef.partial")
    prepared.check_budget()
    if prepared.needs_findings and prepared.findings is None:
        check_budget(detection_estimates(plan, prepared.detection, prepared.resident), prepared.detection.max_memory)
    if output.exists() and not is_placeholder(output):
        with naming_inputs(plan, [output], run.overwrite):
            done = _finished(prepared, output)
        if done:
            return "done"
    plan.refuse_overwriting([output])
    found = next(Journal.peek(journal_of(output)), {})
    ours = {"plan", "stamps"} <= found.keys()
    return "resume" if ours and run.resume and may_resume(output, found, _start(prepared), overwrite=run.overwrite,
                                                          journal=journal_of(output)) else "new"  # fmt: skip


def _finished(prepared: Prepared, output: Path) -> bool:
    """Test whether this very evaluation stands there; refuse anything else that is not to be replaced."""
    try:
        found = load_evaluation(output)
    except StreamerError:
        raise OutputExistsError(
            f"{output}: exists and is not an evaluation, which is all that is replaced; choose another output", output
        ) from None
    if prepared.run.overwrite:
        return False
    if found.facts.get("plan") != prepared.facts["plan"]:
        raise OutputExistsError(
            f"{output}: holds an evaluation of other inputs or options; choose another output, or pass --overwrite",
            output,
        )
    return True


def _start(prepared: Prepared) -> dict[str, Any]:
    """Make the first record of a journal: what run it belongs to, and the threads and the torch on which last bits depend."""
    bits = f"{prepared.findings.bits if prepared.findings else ''} torch {torch.__version__}".strip()
    return {"plan": prepared.facts["plan"], "version": __version__, "stamps": prepared.plan.detection_stamps(),
            "bits": bits, "threads": torch.get_num_threads()}  # fmt: skip


class InMemory:
    """Sums of passes of this run alone."""

    threads = 0

    def __init__(self) -> None:
        self.sums: dict[int, SequenceSums] = {}

    def add(self, number: int, sums: SequenceSums) -> None:
        """Keep the sums of a pass."""
        self.sums[number] = sums


class Journalled(InMemory):
    """Sums of passes that a journal keeps, those of an interrupted run among them."""

    def __init__(self, prepared: Prepared, output: Path) -> None:
        super().__init__()
        self.journal = Journal(journal_of(output))
        start, run = _start(prepared), prepared.run
        found = json.loads(self.journal[0]) if len(self.journal) else {}
        ours = {"plan", "stamps"} <= found.keys()
        self.resumed = (
            ours and run.resume and may_resume(output, found, start, overwrite=run.overwrite, journal=self.journal.path)
        )
        if not self.resumed:
            self.journal.clear()
            self.journal.append(json.dumps(start).encode())
            found = start
        self.threads = found["threads"]
        for i in range(1, len(self.journal)):
            record = json.loads(self.journal[i])
            self.sums[record["pass"]] = SequenceSums(
                *(np.array(record[key], np.float64) for key in ("tokens", *MEASURES))
            )

    def add(self, number: int, sums: SequenceSums) -> None:
        """Keep the sums of a pass, durably; floats are written so that they are read as the same bits."""
        arrays = {"tokens": sums.tokens.tolist(), **{name: getattr(sums, name).tolist() for name in MEASURES}}
        self.journal.append(json.dumps({"pass": number, **arrays}).encode())
        super().add(number, sums)

    def close(self) -> None:
        """Close the journal, which stays."""
        self.journal.close()

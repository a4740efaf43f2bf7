"""Keep the sums of passes in memory or in a journal, and tell whether an evaluation stands or was begun."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from streamer.detection.memory import detection_estimates
from streamer.evaluation.evaluation import load_evaluation
from streamer.evaluation.prepare import Prepared
from streamer.evaluation.result_file import ResultFile, RunJournal, State
from streamer.evaluation.statistics import MEASURES, SequenceSums
from streamer.plan.memory import check_budget


def result_file(prepared: Prepared, output: Path) -> ResultFile:
    """Describe the file of an evaluation."""
    bits = prepared.findings.bits if prepared.findings else ""
    return ResultFile(output, "an evaluation", "this very evaluation", "evaluation.json", prepared.plan, prepared.run,
                      prepared.facts["plan"], lambda path: load_evaluation(path).facts.get("plan"), bits)  # fmt: skip


def inspect(prepared: Prepared, output: Path) -> State:
    """Check, read-only, whether an evaluation can be written to a file, and whether it stands there or was begun."""
    plan, file = prepared.plan, result_file(prepared, output)
    file.check_path()
    prepared.check_budget()
    if prepared.needs_findings and prepared.findings is None:
        check_budget(detection_estimates(plan, prepared.detection, prepared.resident), prepared.detection.max_memory)
    return file.state()


class InMemory:
    """Sums of passes of this run alone.

    Attributes
    ----------
    one_length
        Whether the passes have sequences of one length each; None until the logits have been checked.
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()
        self.one_length: bool | None = None
        self.sums: dict[int, SequenceSums] = {}

    def decide(self, one_length: bool) -> None:
        """Keep what the check of the logits has found."""
        self.one_length = one_length

    def add(self, number: int, sums: SequenceSums) -> None:
        """Keep the sums of a pass."""
        self.sums[number] = sums


class Journalled(InMemory):
    """Sums of passes that a journal keeps, those of an interrupted run among them."""

    def __init__(self, own: RunJournal) -> None:
        super().__init__()
        self._journal, self.threads = own.journal, own.threads
        for record in map(json.loads, own.records()):
            if "one_length" in record:
                self.one_length = record["one_length"]
                continue
            self.sums[record["pass"]] = SequenceSums(
                *(np.array(record[key], np.float64) for key in ("tokens", *MEASURES))
            )

    def decide(self, one_length: bool) -> None:
        """Keep what the check of the logits has found, durably: a run that takes this one up divides the work alike."""
        self._journal.append(json.dumps({"one_length": one_length}).encode())
        super().decide(one_length)

    def add(self, number: int, sums: SequenceSums) -> None:
        """Keep the sums of a pass, durably; floats are written so that they are read as the same bits."""
        arrays = {"tokens": sums.tokens.tolist(), **{name: getattr(sums, name).tolist() for name in MEASURES}}
        self._journal.append(json.dumps({"pass": number, **arrays}).encode())
        super().add(number, sums)

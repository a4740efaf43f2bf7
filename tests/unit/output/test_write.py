"""Outputs of a run: tensors one by one, norms, and outputs that stand already."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import streamer
from streamer.errors import InputChangedError, OutputError
from streamer.events import Event

Job = tuple[Path, Path]


def test_iter_merged_tells_of_each_tensor(job: Job) -> None:
    base, adapter = job
    events: list[Event] = []
    sizes = {
        name: t.nbytes for name, t in streamer.iter_merged(base, adapter, mitigation_lambda=1.0, on_event=events.append)
    }
    assert [e.name for e in events if e.stage == "write"] == [*sizes, ""]
    assert [e.done for e in events if e.stage == "write"] == [0, *itertools.accumulate(sizes.values())]
    assert {e.total for e in events} == {sum(sizes.values())}


def test_iter_merged_stops_when_the_adapter_changes(job: Job) -> None:
    base, adapter = job
    tensors = streamer.iter_merged(base, adapter, mitigation_lambda=1.0)
    next(tensors)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(InputChangedError, match=r"adapter_model.safetensors: changed since the run began"):
        list(tensors)


def test_the_norm_reported_is_that_of_the_adapter_written(job: Job, tmp_path: Path) -> None:
    base, adapter = job
    record = streamer.reduce_intruder_dimension(base, adapter, tmp_path / "out", mitigation_lambda=0.2)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert record["totals"]["dropped_max"] > 0
    for m in record["matrices"]:
        name = f"base_model.model.{m['module']}.lora_"
        delta = written[f"{name}B.weight"].double() @ written[f"{name}A.weight"].double()
        assert m["delta_norm_after"] == pytest.approx(float(torch.linalg.matrix_norm(delta)), rel=1e-9)


def test_output_of_findings_with_other_last_bits_is_there_already(job: Job, tmp_path: Path) -> None:
    """As of those that were made anew on another number of threads."""
    import dataclasses

    base, adapter = job
    findings = streamer.detect_intruder_dimensions(base, adapter)
    merge = streamer.merge_with_reduced_intruder_dimensions
    merge(base, adapter, tmp_path / "out", findings=findings)
    first = findings.matrices[0]
    S = first.detection.S.nextafter(first.detection.S + 1)
    other = dataclasses.replace(first, detection=dataclasses.replace(first.detection, S=S))
    again = dataclasses.replace(findings, matrices=(other, *findings.matrices[1:]))
    assert again.digest() != findings.digest()
    assert merge(base, adapter, tmp_path / "out", findings=again)["state"] == "present"


def test_output_of_other_findings_is_not_taken_for_done(job: Job, tmp_path: Path) -> None:
    base, adapter = job
    findings = streamer.detect_intruder_dimensions(base, adapter)
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", findings=findings)
    import dataclasses

    first = findings.matrices[0]
    d = first.detection
    none = dataclasses.replace(
        first, detection=dataclasses.replace(d, intruders=(), U=d.U[:, :0], S=d.S[:0], Vh=d.Vh[:0])
    )
    edited = dataclasses.replace(findings, matrices=(none, *findings.matrices[1:]))
    with pytest.raises(OutputError, match="holds another output"):
        streamer.merge_with_reduced_intruder_dimensions(base, adapter, tmp_path / "out", findings=edited)

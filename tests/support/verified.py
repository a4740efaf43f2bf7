"""Outputs to be verified, and hands that change them: with and without the digests that would tell."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import streamer


@dataclass(frozen=True)
class Job:
    """Inputs, and what the commands made of them: ``model`` and ``adapter``, at λ = 0.5."""

    base: Path
    adapter: Path
    home: Path

    def copy(self, kind: str, to: Path) -> Path:
        """A copy of one of the outputs."""
        return Path(shutil.copytree(self.home / kind, to / kind))


KINDS = ("model", "adapter")


def make_outputs(base: Path, adapter: Path, home: Path, **options: Any) -> Job:
    findings = home / "findings.safetensors"
    streamer.detect_intruder_dimensions(base, adapter, findings)
    made = {"findings": findings, "mitigation_lambda": 0.5, **options}
    streamer.merge_with_reduced_intruder_dimensions(base, adapter, home / "model", **made)
    return Job(base, adapter, home)


def make_all_outputs(base: Path, adapter: Path, home: Path) -> Job:
    """Make an output of each of `KINDS`; the adapter given moves to ``inputs``."""
    made = make_outputs(base, adapter, home)
    streamer.reduce_intruder_dimension(
        base,
        adapter,
        home / "adapter-out",
        findings=home / "findings.safetensors",
        mitigation_lambda=0.5,
    )
    adapter.rename(home / "inputs")
    (home / "adapter-out").rename(home / "adapter")
    return Job(made.base, home / "inputs", home)


def lines(output: Path, *inputs: Path, **options: Any) -> list[str]:
    """The lines of what differs, or why it is not verified; none if it is."""
    try:
        found = streamer.verify_output(output, *inputs, **options)
        why = []
    except streamer.VerificationError as e:
        found = e.verification
        why = [str(e)]
    assert found["verified"] == (not why)
    return [d["message"] for d in found["differences"]] or why


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit_record(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a record anew, with a digest that is right."""
    path = output / "streamer.json"
    record = json.loads(path.read_text())
    change(record)
    record["sha256"] = "0" * 64
    record["sha256"] = hashlib.sha256((json.dumps(record, indent=1) + "\n").encode()).hexdigest()
    path.write_text(json.dumps(record, indent=1) + "\n")


def agree(output: Path, name: str) -> None:
    """Let the record have a file as it is now."""

    def change(record: dict[str, Any]) -> None:
        entry = next(f for f in record["files"] if f["file"] == name)
        entry |= {"bytes": (output / name).stat().st_size, "sha256": sha256(output / name)}

    edit_record(output, change)


def edit_tensor(path: Path, name: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change a tensor of a file, and nothing else of it."""
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, metadata)

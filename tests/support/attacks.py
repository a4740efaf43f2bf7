"""Changes that someone makes in an output on purpose, with every digest and sum made right again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from verified import Job, agree, edit_record, edit_tensor, lines

Output = Path
Attack = Callable[[Output, Job], None]


def weights(output: Output) -> Path:
    return next(output.glob("*.safetensors"))


def tensor(name: str, change: Callable[[torch.Tensor], Any]) -> Attack:
    """Change the tensor whose name ends so."""

    def attack(output: Output, job: Job) -> None:
        with safe_open(weights(output), "pt") as f:
            (whole,) = [n for n in f.keys() if n.endswith(name)]  # noqa: SIM118
        edit_tensor(weights(output), whole, change)

    return attack


def record(change: Callable[[dict[str, Any]], Any]) -> Attack:
    return lambda output, job: edit_record(output, change)


def config(name: str, **values: Any) -> Attack:
    """Change keys of a JSON file of the output."""

    def attack(output: Output, job: Job) -> None:
        tree = json.loads((output / name).read_text())
        (output / name).write_text(json.dumps(tree | values))

    return attack


def together(*attacks: Attack) -> Callable[[Output, Job], None]:
    def attack(output: Output, job: Job) -> None:
        for one in attacks:
            one(output, job)

    return attack


def right_sums(tree: dict[str, Any]) -> None:
    """Make the sums of a record right again."""
    rows, totals = tree["matrices"], tree["totals"]
    before, after = (float(np.sqrt(sum(m[key] ** 2 for m in rows))) for key in ("delta_norm", "delta_norm_after"))
    totals |= {
        "matrices": len(rows), "intruders": sum(len(m["intruders"]) for m in rows), "delta_norm": before, "delta_norm_after": after,
        "changed": sum(m["delta_norm_after"] != m["delta_norm"] for m in rows), "equal_norm_shrink": after / before if before else 1.0,
        "dropped_max": max((m["dropped"] for m in rows), default=0.0),
    }  # fmt: skip
    totals |= {key: sum(m.get(key, 0) for m in rows) for key in ("values", "rounded_away")}
    if tree["detection"]:
        tree["detection"] |= {"certified": sum(m["certified"] is True for m in rows)}


def make_right(output: Output) -> None:
    """Recompute every digest and sum of an output, and what its weights' metadata repeat."""
    edit_record(output, right_sums)
    tree = json.loads((output / "streamer.json").read_text())
    for path in output.glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            metadata = f.metadata()
        stamp = json.loads(metadata["streamer"])
        stamp |= {key: tree[key] for key in stamp if key not in ("base", "adapter")}
        save_file(load_file(path), path, metadata | {"streamer": json.dumps(stamp)})
    for entry in tree["files"]:
        agree(output, entry["file"])


def add(name: str, text: str = "{}") -> Attack:
    """Put a file into the output, and into its record."""

    def attack(output: Output, job: Job) -> None:
        path = output / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        edit_record(output, lambda tree: tree["files"].append({"file": name, "bytes": 0, "sha256": ""}))
        agree(output, name)

    return attack


def drop(name: str) -> Attack:
    """Take a file from the output, and from its record."""

    def attack(output: Output, job: Job) -> None:
        (output / name).unlink()
        edit_record(output, lambda tree: tree.update(files=[f for f in tree["files"] if f["file"] != name]))

    return attack


def found(output: Output, job: Job, attack: Attack) -> list[str]:
    """Say what a verification of all finds after an attack; nothing differs before it, nor after it without the inputs."""
    assert lines(output, job.base, job.adapter, sample="all") == []
    attack(output, job)
    make_right(output)
    assert lines(output) == []
    return lines(output, job.base, job.adapter, sample="all")

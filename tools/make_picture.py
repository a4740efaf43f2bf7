"""Draw what an intruder is: similarities of leading singular directions before and after mitigation, as an SVG.

    python tools/make_picture.py docs/intruder.svg

The data: a base of `make_checkpoint.py` and its adapter with planted intruders, one of its matrices, its directions by numpy's full SVD
in float64, and the adapter that `streamer mitigate --lambda 0` writes. A row is a direction of the
fine-tuned matrix, the largest first; a column one of the base's; dark is similar. In a row without a dark cell stands a direction that
the base does not have: an intruder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from make_checkpoint import make_checkpoint
from safetensors import safe_open
from shapes import Known

import streamer

MATRIX = "model.layers.0.self_attn.o_proj"
SHOWN = 10
CELL = 18
LEFT = 64
TOP = 62
GAP = 70


def tensor(directory: Path, name: str) -> np.ndarray:
    """Read a tensor in float64, from whichever of a directory's files holds it."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as f:
            if name in f.keys():  # noqa: SIM118 - the reader is no mapping
                return np.asarray(f.get_tensor(name).double())
    raise SystemExit(f"{directory}: has no tensor {name!r}")


def delta(adapter: Path, scaling: float) -> np.ndarray:
    """``scaling · B · A`` of the matrix."""
    A, B = (tensor(adapter, f"base_model.model.{MATRIX}.lora_{factor}.weight") for factor in "AB")
    return scaling * B @ A


def similarities(W: np.ndarray, base: np.ndarray) -> np.ndarray:
    """``|⟨u_j, u⁰_i⟩|`` of the leading directions."""
    U, U0 = (np.linalg.svd(M, full_matrices=False)[0][:, :SHOWN] for M in (W, base))
    return np.abs(U.T @ U0)


def panel(x: int, title: str, below: str, values: np.ndarray, intruders: set[int]) -> list[str]:
    """One table of cells."""
    lines = [
        f'<text x="{x + SHOWN * CELL / 2}" y="{TOP - 30}" text-anchor="middle" font-weight="bold">{title}</text>',
        f'<text x="{x + SHOWN * CELL / 2}" y="{TOP - 12}" text-anchor="middle" fill="#555">{below}</text>',
    ]
    for j, row in enumerate(values):
        for i, value in enumerate(row):
            shade = round(255 * (1 - min(1.0, value)))
            lines.append(
                f'<rect x="{x + i * CELL}" y="{TOP + j * CELL}" width="{CELL}" height="{CELL}" '
                f'fill="rgb({shade},{shade},{min(255, shade + 20)})" stroke="#ddd" stroke-width="0.5"/>'
            )
    for j in sorted(intruders):
        lines.append(
            f'<rect x="{x}" y="{TOP + j * CELL}" width="{SHOWN * CELL}" height="{CELL}" fill="none" stroke="#c00" stroke-width="2"/>'
        )
    lines.append(
        f'<text x="{x + SHOWN * CELL / 2}" y="{TOP + SHOWN * CELL + 18}" text-anchor="middle" fill="#555">'
        "directions of the base</text>"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="SVG file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = make_checkpoint(
            Path(directory), Known(192, 384, layers=1, vocab=512, heads=4, kv_heads=4), rank=4
        )
        findings = streamer.detect_intruder_dimensions(model.base, model.adapter)
        mitigated = Path(directory) / "picture"
        streamer.reduce_intruder_dimension(
            model.base, model.adapter, mitigated, findings=findings, mitigation_lambda=0
        )
        found = next(m for m in findings if m.module == MATRIX)
        W0 = tensor(model.base, f"{MATRIX}.weight")
        before = similarities(W0 + delta(model.adapter, found.scale), W0)
        after = similarities(W0 + delta(mitigated, found.scale), W0)
    second = LEFT + SHOWN * CELL + GAP
    width = second + SHOWN * CELL + 24
    height = TOP + SHOWN * CELL + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    lines += [
        f'<text x="{LEFT - 8}" y="{TOP + j * CELL + 13}" text-anchor="end" fill="#555">{j + 1}</text>'
        for j in range(SHOWN)
    ]
    lines += [
        f'<text transform="translate(16,{TOP + SHOWN * CELL / 2}) rotate(-90)" text-anchor="middle" fill="#555">'
        "directions after fine-tuning</text>"
    ]
    lines += panel(
        LEFT,
        "fine-tuned",
        f"intruders: {', '.join(str(j + 1) for j in found.detection.intruders)}",
        before,
        set(found.detection.intruders),
    )
    lines += panel(second, "mitigated, λ = 0", "each direction is the base's own", after, set())
    arguments.output.write_text("\n".join([*lines, "</svg>\n"]))


if __name__ == "__main__":
    main()

"""Find the files of a base and of an adapter, and refuse any from which the output was not made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamer.errors import MismatchError, MissingInputError, UnsupportedError
from streamer.verification.formulas import CONFIG_NAME, WEIGHTS_NAME

LONGEST_HEADER = 100_000_000
"""Largest header that the format permits, in bytes; the stored length may be arbitrary."""

SAMPLE_BYTES = 4096
"""Bytes in the middle of each tensor that a file's identity digests."""


def model_files(path: Path, identity: Mapping[str, Any], output: Path, role: str = "base") -> list[Path]:
    """Find a model's files by an output's record, which gives their names, sizes, headers and samples.

    Parameters
    ----------
    path
        The model's directory, or its single file.
    identity
        The output's statement about the model.
    role
        Role of the model in messages: the base, or the fine-tuned model used as adapter.

    Raises
    ------
    MissingInputError, MismatchError
        If it is another model.
    """
    paths = []
    for entry in identity.get("files", []):
        file = path if path.is_file() else path / entry["file"]
        if not file.is_file():
            raise MissingInputError(
                f"{path}: expected {entry['file']}, of the {role} of {output}, found none; give that {role}", file
            )
        found = file.stat().st_size, _header_digest(file)
        if found != (entry["bytes"], entry["header_sha256"]):
            raise MismatchError(
                f"{file}: expected {entry['bytes']} bytes with header {entry['header_sha256'][:16]}…, as in the {role} of {output}, found "
                f"{found[0]} with {found[1][:16]}…; give the {role} that it was made from"
            )
        if (sample := _sample_digest(file, found[1])) != entry["sample_sha256"]:
            raise MismatchError(
                f"{file}: expected values with digest {entry['sample_sha256'][:16]}…, as in the {role} of {output}, found "
                f"{sample[:16]}…, of another model of this architecture; give the {role} that it was made from"
            )
        paths.append(file)
    return paths


def check_adapter(path: Path, identity: Mapping[str, Any], output: Path) -> None:
    """Refuse an adapter, or a fine-tuned model used as one, from which the output was not made.

    Raises
    ------
    MissingInputError, MismatchError
        If it is a different one.
    UnsupportedError
        If it is an adapter of a pipeline.
    """
    if "files" in identity:
        model_files(path, identity, output, "fine-tuned model")
        return
    if "weights_sha256" in identity and "config_sha256" not in identity:
        raise UnsupportedError(
            f"{output}: was made from an adapter of a diffusers pipeline, which verify does not recompute; without BASE ADAPTER it "
            "checks the files against their digests"
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).is_file():
            raise MissingInputError(
                f"{path}: expected {name}, found none; give the adapter that {output} was made from", path / name
            )
    weights = path / WEIGHTS_NAME
    digest = hashlib.sha256(_header_digest(weights).encode())
    with weights.open("rb") as f:
        f.seek(8 + int.from_bytes(f.read(8), "little"))
        while piece := f.read(1 << 20):
            digest.update(piece)
    config = hashlib.sha256((path / CONFIG_NAME).read_bytes()).hexdigest()
    for name, wanted, found in (
        (WEIGHTS_NAME, identity.get("weights_sha256"), digest.hexdigest()), (CONFIG_NAME, identity.get("config_sha256"), config),
    ):  # fmt: skip
        if wanted != found:
            raise MismatchError(
                f"{path / name}: expected digest {str(wanted)[:16]}…, as in the adapter of {output}, found {found[:16]}…; "
                "give the adapter that it was made from"
            )


def _sample_digest(path: Path, header_digest: str) -> str:
    """Compute the SHA-256 of the header's hexadecimal digest and the middle `SAMPLE_BYTES` of every tensor, in file order."""
    digest = hashlib.sha256(header_digest.encode())
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        tensors = json.loads(f.read(length))
        for start, stop in sorted(t["data_offsets"] for name, t in tensors.items() if name != "__metadata__"):
            f.seek(8 + length + start + max(0, (stop - start - SAMPLE_BYTES) // 2))
            digest.update(f.read(min(SAMPLE_BYTES, stop - start)))
    return digest.hexdigest()


def _header_digest(path: Path) -> str:
    with path.open("rb") as f:
        length = f.read(8)
        return hashlib.sha256(length + f.read(min(int.from_bytes(length, "little"), LONGEST_HEADER))).hexdigest()

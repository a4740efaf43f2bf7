"""Find the files of a base and of an adapter, and refuse others than an output was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamer.errors import MismatchError, MissingInputError
from streamer.verification.formulas import CONFIG_NAME, WEIGHTS_NAME

LONGEST_HEADER = 100_000_000
"""Bytes that the format permits: what stands at the place of a length may be anything."""


def base_files(path: Path, identity: Mapping[str, Any], output: Path) -> list[Path]:
    """Find the files of a base by the record of an output: those of its names, sizes and headers.

    Parameters
    ----------
    path
        The model's directory, or its one file.
    identity
        What the output says of its base.

    Raises
    ------
    MissingInputError, MismatchError
        If it is another base.
    """
    paths = []
    for entry in identity.get("files", []):
        file = path if path.is_file() else path / entry["file"]
        if not file.is_file():
            raise MissingInputError(
                f"{path}: expected {entry['file']}, of the base of {output}, found none; give that base", file
            )
        found = file.stat().st_size, _header_digest(file)
        if found != (entry["bytes"], entry["header_sha256"]):
            raise MismatchError(
                f"{file}: expected {entry['bytes']} bytes with header {entry['header_sha256'][:16]}…, as in the base of {output}, found "
                f"{found[0]} with {found[1][:16]}…; give the base that it was made from"
            )
        paths.append(file)
    return paths


def check_adapter(path: Path, identity: Mapping[str, Any], output: Path) -> None:
    """Refuse another adapter, or fine-tuned model in its place, than an output was made from.

    Raises
    ------
    MissingInputError, MismatchError
        If it is another one.
    """
    if "files" in identity:
        base_files(path, identity, output)
        return
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


def _header_digest(path: Path) -> str:
    with path.open("rb") as f:
        length = f.read(8)
        return hashlib.sha256(length + f.read(min(int.from_bytes(length, "little"), LONGEST_HEADER))).hexdigest()

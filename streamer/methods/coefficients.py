"""Hold the results of a fit, one for each share of the learning to keep, and the facts of the fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamer.errors import UsageError
from streamer.methods.coefficients_file import FIT, parsed_sets, save_sets
from streamer.methods.fit_set import FitSet, share_name
from streamer.units import counted, listed


@dataclass(frozen=True, eq=False, repr=False)
class Coefficients:
    """Sets of coefficients, one for each share of the learning to keep, and the facts of their fit.

    Attributes
    ----------
    sets
        At least one set. Sets have different shares and the same matrices.
    facts
        JSON values: the identities of ``base`` and ``adapter``, which tie the coefficients to these inputs; options, digests of texts,
        figures. No paths.
    source
        File from which they were read, for messages.
    """

    sets: tuple[FitSet, ...]
    facts: Mapping[str, Any]
    source: Path | None = None

    @property
    def name(self) -> str:
        """Return the name for messages: the file, or "coefficients"."""
        return "coefficients" if self.source is None else str(self.source)

    def __repr__(self) -> str:
        source = f" from {self.source}" if self.source else ""
        return "\n ".join([f"<Coefficients: {counted(len(self.sets), 'set')}{source}", *map(repr, self.sets)]) + ">"

    @property
    def keeps(self) -> list[float]:
        """List the shares to keep, in the order of the sets."""
        return [one.keep for one in self.sets]

    def select(self, keep: float | None = None) -> FitSet:
        """Select the set for a share, or the only set. Shares are compared as `share_name` writes them.

        Raises
        ------
        UsageError
            If no set has that share, or if there are several sets and no share is given.
        """
        shares = listed([share_name(one) for one in self.keeps])
        if keep is None:
            if len(self.sets) > 1:
                raise UsageError(
                    f"keep: expected one of {shares}, the {len(self.sets)} sets of coefficients in {self.name}; choose one"
                )
            return self._bound(self.sets[0])
        found = [one for one in self.sets if share_name(one.keep) == share_name(keep)]
        if not found:
            raise UsageError(
                f"{self.name}: holds no coefficients that keep {share_name(keep)}; the shares in it are {shares}"
            )
        return self._bound(found[0])

    def _bound(self, one: FitSet) -> FitSet:
        return replace(one, facts=self.facts, name=self.name)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the coefficients to a safetensors file; make missing directories.

        Parameters
        ----------
        path
            Path of the file, which appears complete or not at all.
        overwrite
            Whether to replace a file of coefficients. Other files are never replaced, except empty ones.

        Raises
        ------
        OutputExistsError
            If the path holds something that is not replaced; it is a `FileExistsError`.
        OutputError, StorageError
            If the file cannot be written there.
        """
        save_sets(Path(path), self.sets, self.facts, overwrite)


def load_coefficients(path: str | Path) -> Coefficients:
    """Read coefficients from a file.

    Raises
    ------
    FormatError
        If the file does not hold coefficients, or if an array is incomplete, not finite, or has coefficients outside [0, 1].
    """
    return Coefficients(*FIT.read(Path(path), parsed_sets), Path(path))

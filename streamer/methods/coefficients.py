"""Hold what a fit gives for each share of the learning that is kept, and what it was fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamer.errors import UsageError
from streamer.methods.coefficients_file import read_sets, save_sets
from streamer.methods.fit_set import FitSet, share_name
from streamer.units import counted, listed


@dataclass(frozen=True, eq=False, repr=False)
class Coefficients:
    """Sets of coefficients, one for each share of the learning that is kept, and what they were fitted to.

    Attributes
    ----------
    sets
        At least one, of different shares, all of the same matrices.
    facts
        JSON values: ``base`` and ``adapter``, the inputs' identities, without which coefficients belong to no adapter; options, digests
        of texts, figures. No paths.
    source
        The file that they were read from, for messages.
    """

    sets: tuple[FitSet, ...]
    facts: Mapping[str, Any]
    source: Path | None = None

    @property
    def name(self) -> str:
        """Name them in messages: by their file, if they are from one."""
        return "coefficients" if self.source is None else str(self.source)

    def __repr__(self) -> str:
        source = f" from {self.source}" if self.source else ""
        return "\n ".join([f"<Coefficients: {counted(len(self.sets), 'set')}{source}", *map(repr, self.sets)]) + ">"

    @property
    def keeps(self) -> list[float]:
        """List the shares kept, in the order of the sets."""
        return [one.keep for one in self.sets]

    def select(self, keep: float | None = None) -> FitSet:
        """Select the set that keeps a share, or the only one. A share is what `share_name` prints of it.

        Raises
        ------
        UsageError
            If there is none for that share, or several and none is named.
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
                f"{self.name}: holds no coefficients that keep {share_name(keep)}; those there are keep {shares}"
            )
        return self._bound(found[0])

    def _bound(self, one: FitSet) -> FitSet:
        return replace(one, facts=self.facts, name=self.name)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write them as a file, a safetensors file; missing directories are made.

        Parameters
        ----------
        path
            The file. It appears whole, or not at all.
        overwrite
            Whether to replace coefficients that stand there; anything else is not replaced, unless it is an empty file.

        Raises
        ------
        OutputExistsError
            If something else stands there; it is a `FileExistsError`.
        OutputError, StorageError
            If it cannot be written there.
        """
        save_sets(Path(path), self.sets, self.facts, overwrite)


def load_coefficients(path: str | Path) -> Coefficients:
    """Read a file of coefficients.

    Raises
    ------
    FormatError
        If it is another file, or its arrays are not whole, finite and in [0, 1].
    """
    return Coefficients(*read_sets(Path(path)), Path(path))

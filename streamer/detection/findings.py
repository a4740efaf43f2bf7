"""Define the findings: the result of detection for each matrix, with the base, adapter and options that determined it.

On disk they are one safetensors file; `findings_file` describes its layout. While detection runs, a journal beside the file holds a record
for each matrix; a record is itself a safetensors file of the matrix's tensors, and the end of the run combines them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from streamer.detection.findings_file import SCHEMA, FindingsHead, read_findings, save_findings_file
from streamer.detection.findings_records import FindingsRecord, TotalsRecord
from streamer.detection.findings_view import (
    findings_frame,
    findings_html,
    findings_text,
    index_of,
    indices_of,
    is_pattern,
    summary_lines,
)
from streamer.detection.matrix_finding import MatrixFinding
from streamer.detection.options import DetectionOptions
from streamer.detection.random_overlaps import ANOTHER_BASE, look_random
from streamer.errors import MismatchError, UnknownNameError
from streamer.plan.sources import AdapterSource, BaseSource
from streamer.storage.identities import AdapterIdentity, BaseIdentity, difference
from streamer.storage.tensor_file import TensorFile
from streamer.weights.dtypes import as_bytes

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, repr=False)
class Findings:
    """Results for all matrices of an adapter, in the base's file order: a sequence of `MatrixFinding`.

    ``findings[0]`` is one matrix; ``findings[:4]`` are findings for the first four; ``findings["layers.0.self_attn.q_proj"]`` is the matrix
    of that name; and ``findings["*.q_proj"]`` are findings for all that match. See `find` and `select`.

    Attributes
    ----------
    base, adapter
        Identities of the inputs (sizes, digests), without paths, so that the same inputs give the same bytes anywhere.
    options
        The options that determined the findings.
    matrices
        One entry for each matrix.
    sources
        Names of ``base`` and ``adapter``, and ids if known; they do not affect whether findings fit other inputs.
    """

    base: BaseIdentity
    adapter: AdapterIdentity
    options: DetectionOptions
    matrices: tuple[MatrixFinding, ...]
    _file: TensorFile | None = field(default=None, repr=False, compare=False)
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        """Omit the file when pickling for another process: all factors are pickled by value."""
        return {**self.__dict__, "_file": None}

    @classmethod
    def of(cls, head: FindingsHead, matrices: Iterable[MatrixFinding], file: TensorFile | None = None) -> Findings:
        """Make findings from their parts; `file` is the file from which they were read."""
        return cls(head.base, head.adapter, head.options, tuple(matrices), file, head.sources)

    @property
    def head(self) -> FindingsHead:
        """Return everything except the matrices."""
        return FindingsHead(self.base, self.adapter, self.options, self.sources)

    @cached_property
    def by_tensor(self) -> dict[str, MatrixFinding]:
        """Return the entries by the base tensor's name."""
        return {m.tensor: m for m in self.matrices}

    @property
    def name(self) -> str:
        """Return the name for messages: the file's path if they come from a file."""
        return str(self._file.path) if self._file else "findings"

    @property
    def intruders(self) -> int:
        """Count the intruders in all matrices."""
        return sum(len(m.detection.intruders) for m in self.matrices)

    @property
    def totals(self) -> TotalsRecord:
        """Return the totals over all matrices, as in `record`."""
        found, timed = [m.detection for m in self.matrices], [m.seconds for m in self.matrices if m.seconds is not None]
        return {"matrices": len(found), "intruders": self.intruders, "certified": sum(d.certified for d in found),
                "escalated": sum(d.escalated for d in found), "degenerate": sum(bool(d.degenerate) for d in found),
                "looks_like_another_base": look_random(self.matrices, self.options.threshold_epsilon),
                "seconds": sum(timed) if timed else None}  # fmt: skip

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warn if the base does not look like the base on which the adapter was trained."""
        return (ANOTHER_BASE,) if self.totals["looks_like_another_base"] else ()

    def digest(self) -> str:
        """Hash (SHA-256, hex) the decisions and factors of all matrices, which determine what they do to a delta, to the last bit.

        The last bits depend on the number of threads; `decisions_digest` does not.
        """
        digest = hashlib.sha256()
        for m in self.matrices:
            digest.update(f"{m.tensor}{m.detection.intruders}{m.detection.certified}".encode())
            for factor in (m.detection.U, m.detection.S, m.detection.Vh):
                digest.update(as_bytes(factor))
        return digest.hexdigest()

    def decisions_digest(self) -> str:
        """Hash (SHA-256, hex) the inputs and options, and the intruders of each matrix."""
        decisions = [list(m.detection.intruders) for m in self.matrices]
        return hashlib.sha256(json.dumps([self.made_from(), decisions]).encode()).hexdigest()

    def made_from(self) -> str:
        """Hash (SHA-256, hex) everything that determines the findings' bytes."""
        return self.head.digest(m.tensor for m in self.matrices)

    def check_matches(self, base: BaseIdentity, adapter: AdapterIdentity, options: DetectionOptions | None) -> None:
        """Refuse findings that were made with another base, adapter or options.

        Parameters
        ----------
        base, adapter
            Identities of the inputs with which they are to be used.
        options
            The requested options; None accepts the findings' own.

        Raises
        ------
        MismatchError
            Names the one that differs, and how.
        """
        pairs: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...]
        pairs = ("base", {**self.base}, {**base}), ("adapter", {**self.adapter}, {**adapter})
        for what, mine, theirs in pairs:
            if mine != theirs:
                raise MismatchError(
                    f"{self.name}: made with another {what} ({difference(mine, theirs)}); run detect again on this one"
                )
        for name, value in (asdict(options) if options else {}).items():
            mine_value = getattr(self.options, name)
            # The solver and its memory do not matter to users of findings, unless they requested a solver.
            if value != mine_value and not ((name == "solver" and value == "auto") or name == "max_memory"):
                raise MismatchError(
                    f"{self.name}: made with {name}={mine_value!r}, asked for {value!r}; pass the same, or run detect again"
                )

    def find(self, name: str) -> MatrixFinding:
        """Find one matrix by name.

        Parameters
        ----------
        name
            A base tensor's name, an adapter module's name, or the end of one, starting after a dot, that no other matrix shares:
            ``layers.0.self_attn.q_proj``.

        Raises
        ------
        UnknownNameError
            If no matrix or several have it; this is a `KeyError`.
        """
        return self.matrices[index_of(self._names, name)]

    def select(self, pattern: str) -> Findings:
        """Select the findings for the matrices whose tensor or module matches a pattern; mitigate and merge need findings for all matrices.

        Parameters
        ----------
        pattern
            A name with ``*``, ``?`` or ``[…]``, as in file names: ``*.layers.[0-3].*.q_proj``.

        Raises
        ------
        UnknownNameError
            If no matrix matches; this is a `KeyError`.
        """
        return replace(self, matrices=tuple(self.matrices[i] for i in indices_of(self._names, pattern)))

    @overload
    def __getitem__(self, key: int) -> MatrixFinding: ...
    @overload
    def __getitem__(self, key: slice) -> Findings: ...
    @overload
    def __getitem__(self, key: str) -> Any: ...  # `find` or `select`
    def __getitem__(self, key: int | slice | str) -> MatrixFinding | Findings:
        if isinstance(key, slice):
            return replace(self, matrices=self.matrices[key])
        if not isinstance(key, str):
            return self.matrices[key]
        return self.select(key) if is_pattern(key) else self.find(key)

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return any(key is m for m in self.matrices)
        try:
            self.find(key)
        except UnknownNameError:
            return False
        return True

    def __iter__(self) -> Iterator[MatrixFinding]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    @property
    def _names(self) -> list[tuple[str, str]]:
        return [(m.tensor, m.module) for m in self.matrices]

    def record(self) -> FindingsRecord:
        """Return everything except the vectors, as JSON values: the output of `streamer report --json`.

        Names may be added but never change. Seconds are None if the findings were read from a file.
        """
        base, adapter = ({**self.sources.get(what, {})} for what in ("base", "adapter"))
        return {"schema": SCHEMA, "base": cast(BaseSource, base | self.base), "adapter": cast(AdapterSource, adapter | self.adapter),
                "options": self.options.as_dict(), "totals": self.totals, "matrices": [m.record() for m in self.matrices]}  # fmt: skip

    def table(self) -> str:
        """Format a text table with a line for each matrix, and the totals."""
        return findings_text(self.record())

    def __repr__(self) -> str:
        return "<Findings: " + "\n ".join(summary_lines(self.record())) + ">"

    def _repr_html_(self) -> str:
        return findings_html(self.record())

    def to_pandas(self, by: Literal["matrix", "direction"] = "matrix") -> pandas.DataFrame:
        """Return the figures as a data frame; install pandas with ``pip install 'intruder-streamer[pandas]'``.

        Parameters
        ----------
        by
            ``matrix``: one row for each matrix; ``direction``: one row for each leading singular direction. Directions and
            `intruders` count from 0.

        Raises
        ------
        MissingPackageError
            If pandas is not installed; this is an `ImportError`.
        """
        return findings_frame(self.record(), by)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a findings file, with the same bytes as `detect_intruder_dimensions`; create missing directories.

        Parameters
        ----------
        path
            The file. It appears complete or not at all.
        overwrite
            Whether to replace existing findings; any other file is never replaced unless it is empty.

        Raises
        ------
        OutputExistsError
            If another file exists there; this is a `FileExistsError`.
        OutputError, StorageError, LockedError
            If the file cannot be written.
        """
        save_findings_file(Path(path), self.head, self.matrices, overwrite)


def load_findings(path: str | Path) -> Findings:
    """Read a findings file and check its digest; its vectors are read from a memory map when they are used.

    Parameters
    ----------
    path
        A file that `detect_intruder_dimensions`, ``streamer detect`` or `Findings.save` wrote.

    Raises
    ------
    FormatError
        If it is not a findings file, or is damaged or incomplete.
    """
    return Findings.of(*read_findings(Path(path)))

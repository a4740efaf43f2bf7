"""Hold the findings: what was detected in each matrix, and from which base, adapter and options.

On disk they are one safetensors file, whose layout `findings_file` has. While detection runs, each matrix is a record in a journal
beside the file; a record is itself a safetensors file of the matrix' tensors, and the end puts them together.
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
    """All matrices of an adapter, in the base's file order; a sequence of `MatrixFinding`.

    ``findings[0]`` is a matrix, ``findings[:4]`` are findings on the first four, ``findings["layers.0.self_attn.q_proj"]`` is the
    matrix of that name, and ``findings["*.q_proj"]`` are findings on all that fit; see `find` and `select`.

    Attributes
    ----------
    base, adapter
        The identities of the inputs (sizes, digests); no paths, so that the same inputs give the same bytes anywhere.
    options
        What decided the findings.
    matrices
        One entry a matrix.
    sources
        ``base`` and ``adapter``: names, and ids where they are known; they do not decide whether findings fit other inputs.
    """

    base: BaseIdentity
    adapter: AdapterIdentity
    options: DetectionOptions
    matrices: tuple[MatrixFinding, ...]
    _file: TensorFile | None = field(default=None, repr=False, compare=False)
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        """Leave the file out, for another process: all factors are pickled by value."""
        return {**self.__dict__, "_file": None}

    @classmethod
    def of(cls, head: FindingsHead, matrices: Iterable[MatrixFinding], file: TensorFile | None = None) -> Findings:
        """Put findings together; `file` is the one that they were read from."""
        return cls(head.base, head.adapter, head.options, tuple(matrices), file, head.sources)

    @property
    def head(self) -> FindingsHead:
        """Return all but the matrices."""
        return FindingsHead(self.base, self.adapter, self.options, self.sources)

    @cached_property
    def by_tensor(self) -> dict[str, MatrixFinding]:
        """Return the entries by the base tensor's name."""
        return {m.tensor: m for m in self.matrices}

    @property
    def name(self) -> str:
        """Name them in messages: by their file, if they are from one."""
        return str(self._file.path) if self._file else "findings"

    @property
    def intruders(self) -> int:
        """Count the intruders in all matrices."""
        return sum(len(m.detection.intruders) for m in self.matrices)

    @property
    def totals(self) -> TotalsRecord:
        """Sum up all matrices, as `record` has it."""
        found, timed = [m.detection for m in self.matrices], [m.seconds for m in self.matrices if m.seconds is not None]
        return {"matrices": len(found), "intruders": self.intruders, "certified": sum(d.certified for d in found),
                "escalated": sum(d.escalated for d in found), "degenerate": sum(bool(d.degenerate) for d in found),
                "looks_like_another_base": look_random(self.matrices, self.options.threshold_epsilon),
                "seconds": sum(timed) if timed else None}  # fmt: skip

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warn where the base does not look like the one that the adapter was trained on."""
        return (ANOTHER_BASE,) if self.totals["looks_like_another_base"] else ()

    def digest(self) -> str:
        """Hash (SHA-256, hex) the decisions and factors of all matrices: what they would do to a delta, to the last bit.

        Last bits depend on the number of threads; `decisions_digest` does not.
        """
        digest = hashlib.sha256()
        for m in self.matrices:
            digest.update(f"{m.tensor}{m.detection.intruders}{m.detection.certified}".encode())
            for factor in (m.detection.U, m.detection.S, m.detection.Vh):
                digest.update(as_bytes(factor))
        return digest.hexdigest()

    def decisions_digest(self) -> str:
        """Hash (SHA-256, hex) what they were made from, and which directions of each matrix are intruders."""
        decisions = [list(m.detection.intruders) for m in self.matrices]
        return hashlib.sha256(json.dumps([self.made_from(), decisions]).encode()).hexdigest()

    def made_from(self) -> str:
        """Hash (SHA-256, hex) everything that decides their bytes."""
        return self.head.digest(m.tensor for m in self.matrices)

    def check_matches(self, base: BaseIdentity, adapter: AdapterIdentity, options: DetectionOptions | None) -> None:
        """Refuse to be used with another base, adapter or options than they were made with.

        Parameters
        ----------
        base, adapter
            Identities of the inputs that they are to be used with.
        options
            The options that are asked for; None takes those of the findings.

        Raises
        ------
        MismatchError
            Which of them differs, and how.
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
            # Which solver made them, in what memory, does not matter to who uses them, unless one was asked for.
            if value != mine_value and not ((name == "solver" and value == "auto") or name == "max_memory"):
                raise MismatchError(
                    f"{self.name}: made with {name}={mine_value!r}, asked for {value!r}; pass the same, or run detect again"
                )

    def find(self, name: str) -> MatrixFinding:
        """Find the one matrix of a name.

        Parameters
        ----------
        name
            A base tensor's name, an adapter module's, or an end of one, from a dot on, that no other matrix has:
            ``layers.0.self_attn.q_proj``.

        Raises
        ------
        UnknownNameError
            If there is none, or several; it is a `KeyError`.
        """
        return self.matrices[index_of(self._names, name)]

    def select(self, pattern: str) -> Findings:
        """Select the findings on the matrices whose tensor or module a pattern fits; to mitigate or merge takes those on all.

        Parameters
        ----------
        pattern
            A name with ``*``, ``?`` or ``[…]``, as in file names: ``*.layers.[0-3].*.q_proj``.

        Raises
        ------
        UnknownNameError
            If there are none; it is a `KeyError`.
        """
        return replace(self, matrices=tuple(self.matrices[i] for i in indices_of(self._names, pattern)))

    @overload
    def __getitem__(self, key: int) -> MatrixFinding: ...
    @overload
    def __getitem__(self, key: slice) -> Findings: ...
    @overload
    def __getitem__(self, key: str) -> Any: ...  # `find` and `select` say which
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
        """Return all but the vectors, as JSON values: what `streamer report --json` prints.

        Names are added, never changed. Seconds are None where a file was read.
        """
        base, adapter = ({**self.sources.get(what, {})} for what in ("base", "adapter"))
        return {"schema": SCHEMA, "base": cast(BaseSource, base | self.base), "adapter": cast(AdapterSource, adapter | self.adapter),
                "options": self.options.as_dict(), "totals": self.totals, "matrices": [m.record() for m in self.matrices]}  # fmt: skip

    def table(self) -> str:
        """Format a line for each matrix, and the totals, as text."""
        return findings_text(self.record())

    def __repr__(self) -> str:
        return "<Findings: " + "\n ".join(summary_lines(self.record())) + ">"

    def _repr_html_(self) -> str:
        return findings_html(self.record())

    def to_pandas(self, by: Literal["matrix", "direction"] = "matrix") -> pandas.DataFrame:
        """Return the figures as a data frame; pandas comes with ``pip install 'intruder-streamer[pandas]'``.

        Parameters
        ----------
        by
            ``matrix``: a row for each matrix; ``direction``: one for each of its leading singular directions. Directions and
            `intruders` count from 0.

        Raises
        ------
        MissingPackageError
            If pandas is not installed; it is an `ImportError`.
        """
        return findings_frame(self.record(), by)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write them as a findings file, byte for byte as `detect_intruder_dimensions` writes it; missing directories are made.

        Parameters
        ----------
        path
            The file. It appears whole, or not at all.
        overwrite
            Whether to replace findings that stand there; anything else is not replaced, unless it is an empty file.

        Raises
        ------
        OutputExistsError
            If something else stands there; it is a `FileExistsError`.
        OutputError, StorageError, LockedError
            If it cannot be written there.
        """
        save_findings_file(Path(path), self.head, self.matrices, overwrite)


def load_findings(path: str | Path) -> Findings:
    """Read a findings file and compare it with its digest; its vectors are read through a map when they are used.

    Parameters
    ----------
    path
        A file that `detect_intruder_dimensions`, ``streamer detect`` or `Findings.save` wrote.

    Raises
    ------
    FormatError
        If it is not one, or is damaged or incomplete.
    """
    return Findings.of(*read_findings(Path(path)))

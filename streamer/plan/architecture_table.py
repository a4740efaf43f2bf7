"""Read the packaged table of architectures: a record for each class, written by ``tools/make_architectures.py``.

The first line of ``architectures.json.gz`` holds what all classes share. Each further line holds one record, which several classes may
share. A record omits what the records of its inner models already say.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, NamedTuple


class Table(NamedTuple):
    """The table; records are parsed on demand.

    Attributes
    ----------
    source
        Version of transformers from which the table was made.
    classes
        Class → line number of its record.
    types
        Model type → classes that its config can have.
    auto
        Auto class → model type → class that it builds.
    lines
        Records as JSON.
    tie_rules
        Rule → model types. ``always``: the weights are always tied; ``not_alone``: the config key states more than this tie; ``of_text``:
        the ``text_config`` can also state the tie; ``default``: tied by default.
    """

    source: str
    classes: Mapping[str, int]
    types: Mapping[str, tuple[str, ...]]
    auto: Mapping[str, Mapping[str, str]]
    lines: tuple[str, ...]
    tie_rules: Mapping[str, frozenset[str]]


@cache
def table() -> Table:
    """Read the table once."""
    data = gzip.decompress(resources.files(__package__).joinpath("architectures.json.gz").read_bytes())
    head, *lines = data.decode().splitlines()
    facts = json.loads(head)
    types = {model_type: tuple(names) for model_type, names in facts["types"].items()}
    rules = {rule: frozenset(of) for rule, of in facts["tie_rules"].items()}
    return Table(facts["source"], facts["classes"], types, facts["auto"], tuple(lines), rules)


@cache
def record_of(name: str) -> Mapping[str, Any] | None:
    """Return the record of a class, or None if the table has none."""
    line = table().classes.get(name)
    found: dict[str, Any] | None = None if line is None else json.loads(table().lines[line])
    return found


@cache
def conv1d_names() -> frozenset[str]:
    """List the last names of modules that some class stores (in, out), such as ``c_proj``: in an unknown class they may be either way."""
    records = filter(None, map(record_of, table().classes))
    return frozenset(pattern.rpartition(".")[2] for of in records for pattern in of.get("transposed", ()))

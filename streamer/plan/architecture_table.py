"""Read the packaged table of architectures: a record for each class, as ``tools/make_architectures.py`` wrote it.

The first line of ``architectures.json.gz`` holds what all classes share, each other line the record of the classes that say the same. A
record has what the classes of the models within it do not say already.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, NamedTuple


class Table(NamedTuple):
    """The table, whose records are parsed when they are asked for.

    Attributes
    ----------
    source
        The version of transformers that it was made from.
    classes
        Class → the number of its record's line.
    types
        Model type → the classes that a config of it may be of.
    auto
        Auto class → model type → the class that it builds.
    lines
        Records as JSON.
    tie_rules
        Model types: those ``always`` tied, those whose tie is stated for more than itself (``not_alone``), those that take it from their
        ``text_config`` too (``of_text``), and those that are tied by ``default``.
    """

    source: str
    classes: Mapping[str, int]
    types: Mapping[str, tuple[str, ...]]
    auto: Mapping[str, Mapping[str, str]]
    lines: tuple[str, ...]
    tie_rules: Mapping[str, frozenset[str]]


@cache
def table() -> Table:
    """Read the table, once."""
    data = gzip.decompress(resources.files(__package__).joinpath("architectures.json.gz").read_bytes())
    head, *lines = data.decode().splitlines()
    facts = json.loads(head)
    types = {model_type: tuple(names) for model_type, names in facts["types"].items()}
    rules = {rule: frozenset(of) for rule, of in facts["tie_rules"].items()}
    return Table(facts["source"], facts["classes"], types, facts["auto"], tuple(lines), rules)


@cache
def record(name: str) -> Mapping[str, Any] | None:
    """Return the record of a class; None where the table has none."""
    line = table().classes.get(name)
    found: dict[str, Any] | None = None if line is None else json.loads(table().lines[line])
    return found


@cache
def conv1d_names() -> frozenset[str]:
    """List the last names of modules that some class stores (in, out), as ``c_proj``: in an unknown class it may be either way."""
    records = filter(None, map(record, table().classes))
    return frozenset(pattern.rpartition(".")[2] for of in records for pattern in of.get("transposed", ()))

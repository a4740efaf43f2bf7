"""Changes at random: of bytes, of a JSON tree, of a safetensors file's header, of a journal's records."""

import contextlib
import copy
import hashlib
import json
import random
import struct
from collections.abc import Callable
from typing import Any

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 8, 127, 128, 255, 256, 65535, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 53) + 1, 1 << 62, 1 << 63, (1 << 64) - 1,
    1 << 64, 10**30, 0.5, -0.0, 1e-300, 1e308, -1e308, 1e39,
)  # fmt: skip
STRINGS = (
    "", " ", ".", "..", "../x", "/etc/passwd", "C:\\x", "\0", "\n", "\x1b[2J", "\u202e", "é", "\U0001f600", "x" * 300, "x" * 70_000,
    "weight", "model.safetensors", "(", "(a+)+$", "[", "\\", "{0}", "%s", "None", "true", "BF16", "F32", "I32", "U8", "F8_E4M3", "fp8",
)  # fmt: skip
CONTAINERS: tuple[Any, ...] = (
    [],
    {},
    [[]],
    [{}],
    {"": None},
    [0] * 1000,
    {str(i): i for i in range(300)},
)

Mutator = Callable[[random.Random, bytes, list[bytes]], bytes]
"""A random change of one input, given others that may be cut up for it."""


def mutate_bytes(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """One to four changes of a few bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        length = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(7):
            case 0:
                out[at : at + 1] = (
                    bytes([out[at] ^ 1 << rng.randrange(8)]) if at < len(out) else b"\0"
                )
            case 1:
                out[at : at + length] = rng.randbytes(length)
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = rng.randbytes(length)
            case 4:
                out[at:at] = out[at : at + length * 8]
            case 5:
                del out[at:]
            case 6:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                out[at : at + length] = other[start : start + length * 4]
    return bytes(out)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    found = []
    level = [tree]
    while level:
        at = level.pop()
        pairs = list(
            at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ()
        )
        found += [(at, key) for key, _ in pairs]
        level += [value for _, value in pairs]
    return found


def _value(rng: random.Random, old: Any, pool: list[Any]) -> Any:
    """Something else in the place of a value: mostly of its own kind."""
    kind = rng.randrange(8)
    if kind < 4 and isinstance(old, bool | None):
        return rng.choice((True, False, None, 0, 1, "", "yes"))
    if kind < 4 and isinstance(old, int | float):
        return rng.choice(
            (old + 1, old - 1, -old, old * 2, old // 2, float(old), rng.choice(NUMBERS))
        )
    if kind < 4 and isinstance(old, str):
        at = rng.randrange(len(old) + 1)
        return rng.choice(
            (
                old[:at] + rng.choice(STRINGS) + old[at:],
                old[:at],
                old[at:],
                old * 2,
                rng.choice(STRINGS),
            )
        )
    if kind == 4:
        return rng.choice(NUMBERS)
    if kind == 5:
        return rng.choice(STRINGS)
    if kind == 6:
        return copy.deepcopy(rng.choice((*CONTAINERS, None, True, False)))
    return copy.deepcopy(rng.choice(pool))


def mutate_tree(rng: random.Random, tree: Any, others: list[Any]) -> Any:
    """One to four changes of values, keys and places."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(tree)
        if not places:
            return rng.choice(CONTAINERS)
        pool = [at[key] for at, key in [*places, *_places(rng.choice(others))]]
        at, key = rng.choice(places)
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                at[key] = _value(rng, at[key], pool)
            case 4:
                del at[key]
            case 5 if isinstance(at, dict):
                at[_text(_value(rng, str(key), pool))] = at.pop(key)
            case 6 if isinstance(at, dict):
                at[_text(_value(rng, str(key), pool))] = copy.deepcopy(at[key])
            case _:
                if isinstance(at, list):
                    at.insert(rng.randrange(len(at) + 1), copy.deepcopy(rng.choice(pool)))
                else:
                    at[_text(rng.choice([*at, *STRINGS]))] = copy.deepcopy(rng.choice(pool))
    return tree


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)[:100]


def dump(tree: Any) -> bytes:
    """A tree as JSON; what no JSON can say is left as it would be written by a careless program."""
    with contextlib.suppress(UnicodeEncodeError):
        return json.dumps(tree, ensure_ascii=False).encode()
    return json.dumps(tree).encode()


def mutate_json(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A JSON document's tree, or now and then its bytes."""
    if rng.randrange(8) == 0:
        return mutate_bytes(rng, data, others)
    try:
        return dump(mutate_tree(rng, json.loads(data), [json.loads(rng.choice(others))]))
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data, others)


def header_of(data: bytes) -> tuple[Any, bytes]:
    """A safetensors file's header as a tree, and what follows it."""
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def with_header(tree: Any, rest: bytes) -> bytes:
    """A safetensors file of a header and what follows it."""
    body = dump(tree)
    return struct.pack("<Q", len(body)) + body + rest


def mutate_safetensors(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A safetensors file's header tree, its values, or its bytes; JSON within the metadata as a tree of its own."""
    try:
        tree, rest = header_of(data)
        other, _ = header_of(rng.choice(others))
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data, others)
    metadata = tree.get("__metadata__") if isinstance(tree, dict) else None
    inner = (
        [k for k, v in metadata.items() if isinstance(v, str) and v.startswith("{")]
        if isinstance(metadata, dict)
        else []
    )
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(rng, data, others)
    if kind == 1 and rest:
        return with_header(
            tree, mutate_bytes(rng, rest, others)[: len(rest)].ljust(len(rest), b"\xff")
        )
    if kind < 6 and inner:
        key = rng.choice(inner)
        with contextlib.suppress(ValueError, RecursionError):
            metadata[key] = mutate_json(
                rng, metadata[key].encode(), [metadata[key].encode()]
            ).decode(errors="replace")
            return with_header(tree, rest)
    return with_header(mutate_tree(rng, tree, [other]), rest)


def records_of(data: bytes) -> list[bytes]:
    """The payloads of a journal's whole records."""
    out = []
    at = 0
    while at + 40 <= len(data):
        n = int.from_bytes(data[at : at + 8], "little")
        payload = data[at + 40 : at + 40 + n]
        if len(payload) < n or hashlib.sha256(payload).digest() != data[at + 8 : at + 40]:
            break
        out.append(payload)
        at += 40 + n
    return out


def journal_bytes(records: list[bytes]) -> bytes:
    """A journal of these payloads, each with its length and digest."""
    return b"".join(len(r).to_bytes(8, "little") + hashlib.sha256(r).digest() + r for r in records)


def mutate_journal(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """A journal's records, framed anew, or its bytes."""
    records = records_of(data)
    if not records or rng.randrange(3) == 0:
        return mutate_bytes(rng, data, others)
    i = rng.randrange(len(records))
    match rng.randrange(6):
        case 0:
            del records[i]
        case 1:
            records.insert(i, rng.choice(records))
        case 2:
            rng.shuffle(records)
        case _:
            change = mutate_json if records[i].lstrip()[:1] in (b"{", b"[") else mutate_safetensors
            records[i] = change(rng, records[i], records)
    return journal_bytes(records)

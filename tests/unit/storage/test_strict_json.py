"""JSON as the standard has it: every value is read back, and what is none is refused by one kind of error."""

from __future__ import annotations

import contextlib
import json

from hypothesis import given
from hypothesis import strategies as st

from streamer.storage.strict_json import strict_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(JSON)
def test_strict_json_is_json(value: object) -> None:
    assert strict_json(json.dumps(value).encode()) == value


@given(st.binary(max_size=60))
def test_strict_json_fails_by_value_error_only(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        strict_json(raw)

"""Fixtures of the storage layer's tests."""

from pathlib import Path

import pytest
from transactions import Case, make_case


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """The plan of an output of four files, one of them a copy, and its input directory."""
    return make_case(tmp_path)

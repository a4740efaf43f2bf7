"""Name which of a matrix's intruders are scaled."""

from __future__ import annotations

from typing import Literal

Selection = Literal["all", "first"]
"""The intruders of a matrix that are scaled: all, or the highest-ranked one."""

"""Fixtures of documents and tools."""

from __future__ import annotations

from forks import model_server

__all__ = ["model_server"]

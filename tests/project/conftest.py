"""Fixtures of documents and tools."""

from forks import model_server

__all__ = ["model_server"]

"""Fixtures of commands."""

from __future__ import annotations

from remote_jobs import local, served

__all__ = ["local", "served"]

"""Fixtures of commands."""

from remote_jobs import local, served

__all__ = ["local", "served"]

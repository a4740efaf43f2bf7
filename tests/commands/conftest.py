"""Fixtures of commands."""

from forks import model_server
from remote_jobs import local, served

__all__ = ["local", "model_server", "served"]

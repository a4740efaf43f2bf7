"""Decisions: the leading directions of each matrix, and the findings file."""

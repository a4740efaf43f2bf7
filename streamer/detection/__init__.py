"""Decide on the leading directions of each matrix, and read and write the findings file."""

"""Measure variants of a model on texts: read sequences, run passes, sum losses, and keep the sums in a journal."""

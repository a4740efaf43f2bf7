"""Measure variants of a model on texts: read sequences, let variants ride, sum losses, and keep the sums in a journal."""

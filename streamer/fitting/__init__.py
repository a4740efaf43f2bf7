"""Fit a coefficient to each direction of an adapter's delta: numeric algorithm, without models and files."""

"""Quantized formats: one module for each family, found through `registry`."""

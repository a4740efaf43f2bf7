"""Decode quantized formats: one module for each family, found through `registry`."""

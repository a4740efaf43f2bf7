"""Coefficients of an adapter's directions, fitted to two texts in streaming passes with gradients."""

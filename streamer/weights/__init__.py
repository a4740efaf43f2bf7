"""Logical weights of a base: its tensors as float matrices, plain or quantized."""

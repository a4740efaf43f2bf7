"""Read a base's logical weights: its tensors as float matrices, plain or quantized."""

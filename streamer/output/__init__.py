"""Make results: mitigated deltas, output tensors, files."""

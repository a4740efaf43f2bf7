"""Results: mitigated deltas, output tensors, files."""

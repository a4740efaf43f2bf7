"""Bytes on disk: safetensors headers, checkpoints, atomic output. Knows no mathematics and no torch."""

"""Read safetensors files and write crash-safe files, as bytes: no mathematics, no torch."""

"""Safetensors files in, crash-safe files out, as bytes: no mathematics, no torch."""

"""Base models as logical weights, however they are encoded on disk; `registry` has one entry an encoding."""

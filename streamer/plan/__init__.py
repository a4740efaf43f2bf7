"""Matching: the base tensor that each module changes; every refusal."""

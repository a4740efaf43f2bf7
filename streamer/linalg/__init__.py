"""Compute with matrices as operators: low-rank algebra, singular triplets, overlaps. This layer reads no files."""

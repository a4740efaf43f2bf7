"""Mathematics on operators: low-rank algebra, singular triplets, overlaps. Knows no files."""

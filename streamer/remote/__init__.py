"""Read inputs at addresses: hub names, buckets, and https."""

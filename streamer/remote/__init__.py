"""Inputs at addresses: names on the hub, buckets, and https."""

"""Fit a coefficient to each direction of an adapter's delta, or factors to the modules' inputs."""

"""Run a base's model from its files: read each weight when its module runs, for several variants of an adapter at once."""

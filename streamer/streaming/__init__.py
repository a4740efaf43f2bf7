"""The model of a base, run from its files: each weight is read when its module runs, for several variants of an adapter at once."""

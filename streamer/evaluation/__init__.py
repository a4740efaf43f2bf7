"""Measure the losses of a model's mitigated variants on a user's texts, in sweeps over the base."""

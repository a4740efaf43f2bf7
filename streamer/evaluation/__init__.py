"""Losses of every mitigated variant of a model on a user's text, in streaming passes over the base."""

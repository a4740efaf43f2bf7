"""Deltas: a PEFT adapter or a fine-tuned model, module by module."""

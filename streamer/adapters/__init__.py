"""Read deltas, module by module, from a PEFT adapter or a fine-tuned model."""

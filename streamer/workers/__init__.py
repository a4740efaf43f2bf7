"""Give tasks to workers: processes of this machine, or those of an engine; results come back as values, and the caller alone writes."""

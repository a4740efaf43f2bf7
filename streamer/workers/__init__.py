"""Run tasks on workers: processes on this machine or of a distributed engine. Results come back as values; only the caller writes."""

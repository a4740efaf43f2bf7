"""Check an output against its record and its inputs by safetensors, numpy and scipy, apart from the code that wrote it."""

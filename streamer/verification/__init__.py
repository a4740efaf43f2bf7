"""Check an output against its record and its inputs with safetensors, numpy and scipy, independently of the code that wrote it."""

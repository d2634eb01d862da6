"""Benchmarks of speed and memory: one file a question, all told by `python -m scripts.bench`."""

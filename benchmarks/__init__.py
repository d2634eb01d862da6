"""Benchmarks: tasks, prompts and official metrics. They do not know that cache methods exist."""

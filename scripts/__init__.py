"""Command-line tools around the results: reports, benchmarks, plans."""

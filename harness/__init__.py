"""The runner: configuration to cells, samples to records, records to summaries."""

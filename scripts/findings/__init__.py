"""Does merging beat evicting? The runs of docs/findings.md, and what they say."""

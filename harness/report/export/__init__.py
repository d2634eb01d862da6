"""What a report leaves for other programs: Markdown, CSV, LaTeX, Every Eval Ever, and a card."""

"""What a run that observes has found: tables, figures, and what they say of the paper's claims."""

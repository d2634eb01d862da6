"""What a run would do, and the memory, time and money that it would take (`dry_run=true`)."""

"""`dry_run=true`: what a run would do, and the memory it would need."""

"""The memory estimate of a run before it starts, as `dry_run=true` prints it."""

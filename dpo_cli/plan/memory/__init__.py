"""How much memory a run takes, worked out before it starts; `dry_run=true` prints it."""

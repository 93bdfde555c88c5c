"""`dry_run=true`: the plan of a run, and an estimate of its memory."""

"""Many runs: recipes and sweeps, with one process per run."""

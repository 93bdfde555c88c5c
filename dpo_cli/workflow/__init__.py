"""Many runs: recipes of steps, sweeps, and the process each run gets."""

"""Recipes and sweeps: several runs, one process per run."""

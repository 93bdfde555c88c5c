"""The checks of `gpu_check.py`, their expectations, and how they are run."""

"""The checks that `gpu_check.py` runs, what is expected of them, and how they are run."""

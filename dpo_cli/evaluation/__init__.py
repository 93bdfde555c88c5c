"""Evaluation of policies: rewards, KL, the optimum, win rates, judges; preference labels."""

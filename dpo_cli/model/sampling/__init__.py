"""Sampling: which way of decoding is right for a model, and the fast ones."""

"""Sampling: decoding modes, and which of them reproduces a model's plain forward."""

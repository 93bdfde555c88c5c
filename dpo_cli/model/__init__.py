"""Loading, packed attention, log-probabilities and sampling of causal language models."""

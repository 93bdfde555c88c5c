"""Scorers of completions: reward models, classifiers, word lists, the policy itself."""

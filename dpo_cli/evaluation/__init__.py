"""Rewards, judges, preference labels, statistics."""

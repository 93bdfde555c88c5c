"""Rows to token ids: sources, adapters, encoding, order."""

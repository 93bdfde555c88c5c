"""Shared by all stages: the session, its rows, reference, precision and samples."""

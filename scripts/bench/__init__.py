"""The benchmark: `python scripts/bench.py [compare|profile|scale|memory|save] ...`.

A command builds a `Plan` (input: weights, rows) and a `Job` (the work of one process), starts
workers (`workers/`, one process each, `job.json` in and `result.json` out) in turn, summarizes
their results and writes a page.
"""

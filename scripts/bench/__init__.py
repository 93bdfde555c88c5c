"""The benchmark: `python scripts/bench.py [compare|profile|scale|memory|save] ...`.

A command makes a `Plan` (what is read: weights, rows) and a `Job` (what one process does), starts
workers (`workers/`, a process each, `job.json` in and `result.json` out) in turn, sums up what
they answer and keeps it on a page.
"""

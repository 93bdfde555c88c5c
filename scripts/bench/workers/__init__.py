"""Code that runs in a separate process: `-m scripts.bench.workers.NAME IN [OUT]`, both JSON."""

"""What is run in a process of its own: `-m scripts.bench.workers.NAME IN [OUT]`, both JSON."""

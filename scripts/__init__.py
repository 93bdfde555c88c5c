"""Programs beside the tool: the benchmark, fault injection and the GPU checks."""

"""Development programs: the benchmark, fault injection and the GPU checks."""

"""Programs beside the tool: the benchmark, the fault programme and the check of a GPU."""

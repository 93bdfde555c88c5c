"""Multi-process runs: launching ranks, collectives, hang detection, FSDP, sharded checkpoints."""

"""Device, optimiser, checkpoints and the one training loop."""

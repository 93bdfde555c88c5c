"""Device, optimizer, checkpoints and the training loop."""

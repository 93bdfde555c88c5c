"""One run on many devices: who does what, who hangs, and how weights are sharded."""

"""What a run tells people: progress, metric sinks, curves, the model card, its own files."""

"""Reports of a run: progress, metric sinks, plots, the model card, report.html, its files."""

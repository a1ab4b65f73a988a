"""Command-line tools beside the experiment: `python -m tools.export_vectors`."""

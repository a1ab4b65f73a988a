"""Command-line tools beside the experiment, for example `python -m tools.export_vectors`."""

"""Scorers of written text: trait classifiers and a judge."""

"""Repeat parts of an experiment with other layers, blocks or amounts of text."""

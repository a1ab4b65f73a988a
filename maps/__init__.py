"""Pairs of activations, maps between them, and which layers they join; no run is known here."""

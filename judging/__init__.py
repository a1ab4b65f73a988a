"""Judges: chat models that rate coherence and trait of a text, on a server or loaded here (phase 5)."""

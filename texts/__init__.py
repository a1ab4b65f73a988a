"""Texts that a run reads: neutral passages, personas, prompts, and where two tokenizers align."""

"""The foundations: errors, files, journals, the package cache, sums over pairs, tiny models."""

"""One file a step of a run; each owns its artifacts, their cache keys and its log line."""

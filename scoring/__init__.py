"""Score written text: trait scorers, judges, and their validation."""

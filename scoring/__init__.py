"""Score written text: trait scorers and their validation."""

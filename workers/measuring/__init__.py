"""How fast a model is on this machine, and whether it keeps the laws. Knows no text, no jobs."""

"""A model's session, on the host or a GPU, and its memory: rows in, logits out. Knows no text."""

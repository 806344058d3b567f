"""A model's folder: what its files say, and the graph prepared from it. Knows no sessions."""

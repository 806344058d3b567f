"""A model from outside, built into a folder by a program of its own. Knows no sessions."""

"""Rows of logits to tokens, on the host or a GPU. Knows neither text nor who asked."""

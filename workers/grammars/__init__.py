"""What a completion must look like, as masks of the tokens that may come next. Draws none."""

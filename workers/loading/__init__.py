"""A model in memory, all its parts put together. Knows nothing of who asks anything of it."""

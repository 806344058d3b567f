"""The HTTP doors: the status API, the OpenAI surface, the pages. Reads and writes the same rows."""

"""Text to token ids and back, messages to prompts, calls in text. Knows no model's weights."""

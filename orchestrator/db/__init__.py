"""What is known: tables, sessions, every write and every read."""

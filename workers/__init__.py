"""Knows completions and devices; up to engine.py nothing of jobs, SQL or Celery."""

"""Knows completions and devices; its rooms know nothing of jobs, SQL or Celery."""

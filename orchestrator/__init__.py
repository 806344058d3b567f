"""Knows jobs: what was asked, what is known, what comes next. Knows nothing of devices."""

__version__ = "0.1.0"

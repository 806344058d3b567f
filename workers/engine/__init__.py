"""Completions in, events out, a step at a time. Knows neither files nor devices, nor any job."""

"""Comparisons of methods over seeds: plans, their runs, and what the records say."""

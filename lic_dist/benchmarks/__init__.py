"""Benchmarks: each claim of speed or quality measured beside a named baseline, in one run."""

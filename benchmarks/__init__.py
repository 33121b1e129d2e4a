"""Benchmarks: one question per file, correctness first, then alternating medians."""

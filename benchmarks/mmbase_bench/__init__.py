"""Benchmarks: one file per subject, peers side by side."""

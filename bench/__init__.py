"""Benchmarks and the records they leave under `bench/results`."""

"""Benchmarks, each a command that prints its conditions and its figures."""

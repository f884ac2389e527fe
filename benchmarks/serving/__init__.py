"""Benchmarks of `fastllama serve`: the cost of HTTP over a bare AsyncEngine, and clients that misbehave."""

"""Benchmarks of ops beyond `fastllama bench ops`: optional libraries, a block compared with torch, tuning, reports."""

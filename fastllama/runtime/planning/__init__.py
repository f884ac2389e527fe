"""Scheduling and KV page allocation: plain Python, no torch."""

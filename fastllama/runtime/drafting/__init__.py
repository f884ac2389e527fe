"""Speculative decoding: the drafters, and the decision when draft tokens pay."""

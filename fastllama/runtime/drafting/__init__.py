"""Speculative decoding: what proposes draft tokens, and when that pays."""

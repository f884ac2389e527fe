"""Speculative decoding: who drafts tokens, and when that pays."""

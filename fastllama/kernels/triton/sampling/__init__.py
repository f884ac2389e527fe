"""Sampling of tokens by exact integer masses, without a sort, and the adjustment of logits before it."""

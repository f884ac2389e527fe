"""Sampling of tokens by exact integer masses, without a sort, and what is done to logits before."""

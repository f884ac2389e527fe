"""Sampling of tokens by exact integer masses, without a sort."""

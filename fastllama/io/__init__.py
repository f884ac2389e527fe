"""Checkpoints, tokenizers and chat formats: reading and writing a model's files."""

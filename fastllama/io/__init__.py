"""Checkpoints, tokenizers and chat formats: what crosses from files to the model and back, not how it runs."""

"""Checkpoint formats: each reads one layout on disk and gives tensors under Hugging Face names."""

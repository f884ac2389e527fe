"""Checkpoint formats: each reads one layout on disk and yields tensors under Hugging Face names."""

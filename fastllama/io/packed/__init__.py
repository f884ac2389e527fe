"""Formats of quantized weights in a Hugging Face folder: their tensors and their configuration."""

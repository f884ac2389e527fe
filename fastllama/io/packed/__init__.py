"""Formats of quantized weights in a Hugging Face folder, one file for each: their tensors, their configuration."""

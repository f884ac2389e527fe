"""Quantizers of single weights, from tensors to integers with scales; `layers/quantizing.py` runs them on a model."""

"""Quantizers on tensors: a weight in, integers with scales out. Knows no model; `layers/calibration.py` walks one."""

"""Execution of steps on the device: inputs, forward pass, sampling, CUDA graphs, memory."""

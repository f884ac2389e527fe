"""One step on the device: inputs, forward pass, sampling, CUDA graphs, memory."""

"""The memory-bound kernels: each token or row is read and written once."""

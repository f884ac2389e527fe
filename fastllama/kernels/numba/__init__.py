"""CPU kernels compiled by Numba, in out-form: weights at memory speed, small ops in one pass; imported on first use."""

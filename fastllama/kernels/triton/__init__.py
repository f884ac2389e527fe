"""Triton kernels and their launchers, in out-form; imported only when an op first needs one."""

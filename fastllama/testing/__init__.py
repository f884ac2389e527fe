"""Tests Triton kernels without a GPU; docs/kernels/testing.md shows how to use it in another project."""

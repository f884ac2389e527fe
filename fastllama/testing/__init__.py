"""What proves Triton kernels without a GPU, ours or anyone's: docs/testing.md shows how another project uses it."""

"""What proves Triton kernels without a GPU, ours or anyone's: docs/kernels/testing.md shows how another project uses it."""

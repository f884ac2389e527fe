"""An H100 that keeps memory and order but computes nothing, under the real torch and the real Triton."""

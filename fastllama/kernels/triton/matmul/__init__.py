"""Matmuls by dense and quantized weights for few rows, with norm, residual and SwiGLU fused."""

"""Benchmarks of the CPU kernels: decoding compared with llama.cpp, decoding on a busy machine, and single ops."""

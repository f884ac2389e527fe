"""Studies of the CPU kernels: decoding beside llama.cpp, beside busy neighbours, and single ops."""

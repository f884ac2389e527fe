"""Legal calls of every op, small ones and those of a Llama, for tests, `verify` and benchmarks."""

"""The legal calls of every op, small and in the sizes of a Llama: what tests, `verify` and benchmarks call ops with."""

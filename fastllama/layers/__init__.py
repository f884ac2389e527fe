"""Llama as modules: a configuration, layers that call ops, and the batch as an argument; independent of requests."""

"""Llama as modules: a configuration, a batch passed as an argument, and layers that call ops and know nothing of requests."""

"""Llama as modules: a configuration, a batch passed as an argument, layers that call ops and know no requests."""

"""Requests in, tokens out: what is scheduled when, which KV pages it uses, and the engine that drives the model."""

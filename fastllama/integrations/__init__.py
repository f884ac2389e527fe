"""Adapters that run fastllama's ops inside other inference stacks, one folder per stack."""

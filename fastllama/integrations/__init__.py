"""Adapters that run this project's ops inside other inference stacks, one folder for each."""

"""Measurements of the library, each a command that prints its conditions beside its figures."""

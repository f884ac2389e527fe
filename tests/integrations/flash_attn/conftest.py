"""Parametrizes every test of flash-attn's functions over the libraries that have them."""

from tests.integrations.flash_attn.libraries import library

__all__ = ["library"]

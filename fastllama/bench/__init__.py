"""The measurements of `fastllama bench`."""

"""Draws every picture of the documentation from committed results and the package's own imports: `make plots`."""

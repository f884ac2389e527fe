"""Every picture of the documentation, drawn from committed results and the package's own imports: `make plots`."""

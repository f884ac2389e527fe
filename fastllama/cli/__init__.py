"""The `fastllama` command: one file for each subcommand, and no heavy import before one of them runs."""
